"use strict";
// The report works without this: here are sorting, the filter, notes on hover, and the browser of examples.
// Text of data and models is set as textContent alone.

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// --- sorting: a button in each column's head ------------------------------------------------------------------------

function worth(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.textContent.trim();
}

function compare(a, b) {
  if (a === "" || a === "-") return b === "" || b === "-" ? 0 : 1; // what is not known comes last
  if (b === "" || b === "-") return -1;
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, column, down) {
  const body = table.tBodies[0];
  const known = (row) => !["", "-"].includes(worth(row, column));
  const rows = Array.from(body.rows);
  rows.sort((a, b) => {
    const order = compare(worth(a, column), worth(b, column));
    return down && known(a) && known(b) ? -order : order;
  });
  body.append(...rows);
  Array.from(table.tHead.rows[0].cells).forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sorted")) {
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const button = make("button", { type: "button", title: "sort", text: head.textContent });
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const numbers = table.tBodies[0].rows[0] && typeof worth(table.tBodies[0].rows[0], column) === "number";
      sort(table, column, now ? now === "ascending" : numbers); // numbers begin with the largest
    });
    head.replaceChildren(button);
  });
}

// --- filter: by model and task, kept in the address -----------------------------------------------------------------

const filter = document.querySelector(".filter");

function asked() {
  return new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
}

function apply() {
  const wanted = asked();
  for (const select of filter.querySelectorAll("select")) {
    const value = wanted.get(select.name) || "";
    select.value = Array.from(select.options).some((option) => option.value === value) ? value : "";
  }
  const chosen = Array.from(filter.querySelectorAll("select")).map((select) => [select.name, select.value]);
  for (const element of document.querySelectorAll("[data-task], [data-model]")) {
    element.hidden = chosen.some(([key, value]) => value && key in element.dataset && element.dataset[key] !== value);
  }
}

if (filter) {
  filter.hidden = false;
  filter.addEventListener("change", () => {
    const wanted = new URLSearchParams();
    for (const select of filter.querySelectorAll("select")) if (select.value) wanted.set(select.name, select.value);
    history.replaceState(null, "", `#${wanted}`);
    apply();
  });
  addEventListener("hashchange", apply);
  apply();
}

// --- notes: what a figure says of the place under the pointer, or near it -------------------------------------------

const NEAR = 14; // CSS pixels
const tip = make("div", { class: "tip", role: "status", hidden: "" });
document.body.append(tip);

for (const title of document.querySelectorAll(".note > title")) {
  title.parentNode.dataset.note = title.textContent; // or the browser would show it a second time
  title.parentNode.setAttribute("aria-label", title.textContent);
  title.remove();
}

function noteAt(event) {
  const hit = event.target.closest(".note");
  if (hit) return hit;
  const figure = event.target.closest("svg");
  let [best, least] = [null, NEAR];
  for (const mark of figure ? figure.querySelectorAll("use.note") : []) {
    const box = mark.getBoundingClientRect();
    const far = Math.hypot(event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2);
    if (far < least) [best, least] = [mark, far];
  }
  return best;
}

function say(event) {
  const found = event.target.closest && event.target.closest(".plot") ? noteAt(event) : null;
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = found.dataset.note;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${event.clientY + 16 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 16}px`;
}

document.addEventListener("pointermove", say);
document.addEventListener("pointerdown", say);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

// --- examples on which two cells differ -----------------------------------------------------------------------------

const PAGE = 5;
const KINDS = {
  any: "they differ in any way",
  first: "only the first is right",
  second: "only the second is right",
  wrong: "both are wrong, unlike each other",
};

function kindOf([answer, right], [other, otherRight]) {
  if (right === null || otherRight === null) return null;
  if (right !== otherRight) return right ? "first" : "second";
  return !right && answer !== other ? "wrong" : null;
}

function choice(label, options, value) {
  const select = make("select", { "aria-label": label });
  for (const [key, text] of options) select.append(make("option", { value: key, text }));
  select.value = value;
  return [make("label", {}, label, select), select];
}

function said(name, example, [answer, right]) {
  const verdict = { 1: "right", 0: "wrong" }[right] || "not scored";
  const term = make("dt", {}, `${name}: `, make("span", { class: verdict, text: verdict }));
  return make("div", {}, make("dl", {}, term, make("dd", { text: example.answers[answer] || "(no answer)" })));
}

function shown(example, names, first, second) {
  const top = make("dl", {});
  for (const [term, text] of [["prompt", example.prompt], ["right answer", example.gold]]) {
    if (text !== null) top.append(make("dt", { text: term }), make("dd", { text }));
  }
  const pair = make("div", { class: "pair" });
  for (const i of [first, second]) pair.append(said(names[i], example, example.given[i]));
  return make("article", { class: "example" }, make("div", { class: "small", text: example.id }), top, pair);
}

function browse(box) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const cells = data.cells.map((name, i) => [String(i), name]);
  const [firstLabel, first] = choice("first cell", cells, "0");
  const [secondLabel, second] = choice("second cell", cells, String(Math.min(1, cells.length - 1)));
  const [kindLabel, kind] = choice("show where", Object.entries(KINDS), "any");
  const back = make("button", { type: "button", class: "step", text: "\u2190", "aria-label": "earlier examples" });
  const on = make("button", { type: "button", class: "step", text: "\u2192", "aria-label": "further examples" });
  const where = make("span", { role: "status" });
  const list = make("div", {});
  let start = 0;
  function draw() {
    const [a, b] = [Number(first.value), Number(second.value)];
    const found = data.examples.filter((example) => {
      const is = kindOf(example.given[a], example.given[b]);
      return is && (kind.value === "any" || is === kind.value);
    });
    start = Math.max(0, Math.min(start, found.length - 1));
    start -= start % PAGE;
    const end = Math.min(start + PAGE, found.length);
    where.textContent = found.length ? `${start + 1} to ${end} of ${found.length}` : "no such example here";
    back.disabled = start === 0;
    on.disabled = end >= found.length;
    list.replaceChildren(...found.slice(start, end).map((example) => shown(example, data.cells, a, b)));
  }
  for (const select of [first, second, kind]) select.addEventListener("change", () => { start = 0; draw(); });
  back.addEventListener("click", () => { start -= PAGE; draw(); });
  on.addEventListener("click", () => { start += PAGE; draw(); });
  const controls = make("div", { class: "controls" }, firstLabel, secondLabel, kindLabel, back, on, where);
  box.querySelector(".static").replaceWith(controls, list);
  draw();
}

// Parsed when it comes near, or before printing: several megabytes may lie there.
const boxes = new Set(document.querySelectorAll(".browser"));
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && boxes.delete(entry.target)) browse(entry.target);
}, { rootMargin: "400px" });
for (const box of boxes) near.observe(box);

// --- paper: everything unfolded -------------------------------------------------------------------------------------

let folded = [];
addEventListener("beforeprint", () => {
  folded = Array.from(document.querySelectorAll("details:not([open])"));
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });

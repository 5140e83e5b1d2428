"""The blocks that params.yaml may hold below `methods`, one class for each kind."""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from molf.blocks import Block, Count, Fraction, NotNegative, Positive
from molf.nn import Forward
from molf.optim import Decider, Scope, contradiction


class MethodBase(Block):
    """What every method block may say."""

    adapter: ClassVar[bool] = False  # whether its weights are a small file beside the base model

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        """How several processes cannot share a cell of it, each with the reason; what works is not in it."""
        return {}

    def brief(self) -> Self:
        """The same for a training of two steps or more that is only timed."""
        return self

    def learning_rates(self) -> dict[str, float]:
        """Its learning rates by their keys, which are those that end so."""
        return {name: value for name, value in self if name.endswith("learning_rate")}

    def at_factor(self, factor: float) -> Self:
        """The block with each learning rate times a factor, to 12 digits."""
        rates = self.learning_rates() if factor != 1 else {}
        return self.model_copy(update={name: float(f"{rate * factor:.12g}") for name, rate in rates.items()})


class FftMethod(MethodBase):
    """Full fine-tuning: every parameter with AdamW."""

    kind: Literal["fft"]
    learning_rate: Positive
    weight_decay: NotNegative


class LoraMethod(MethodBase):
    """One LoRA adapter by PEFT on all linear layers but the excluded, or a relative that changes one thing of it."""

    adapter = True
    kind: Literal["lora"]
    r: Count
    lora_alpha: Positive
    use_rslora: bool  # scale alpha / sqrt(r) instead of alpha / r
    lora_dropout: Fraction
    exclude_modules: list[str]
    learning_rate: Positive
    weight_decay: NotNegative
    # What follows means plain LoRA where it is not given.
    use_dora: bool = False  # a trained magnitude for each row, beside its direction: DoRA (arXiv 2402.09353)
    # pissa: A and B begin at the weight's r largest singular values, the base keeps the rest (arXiv 2404.02948).
    init_lora_weights: Literal["default", "pissa"] = "default"
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0  # B's rate over learning_rate, A's: LoRA+ (arXiv 2402.12354)
    base_bits: Literal[4] | None = None  # 4: the targets' frozen weights are NF4: QLoRA (arXiv 2305.14314)

    @model_validator(mode="after")
    def _fits(self) -> "LoraMethod":
        if self.use_dora and self.init_lora_weights == "pissa":
            raise ValueError(
                "use_dora: true takes its magnitudes from the base weight, which init_lora_weights: pissa takes apart; "
                "use one of them"
            )
        if self.base_bits is not None and (self.use_dora or self.init_lora_weights != "default"):
            raise ValueError(
                "base_bits: 4 rounds the weight that use_dora and init_lora_weights: pissa start from; leave these out"
            )
        return self

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        return {"fsdp": "a weight of 4 bits cannot be cut by rows"} if self.base_bits is not None else {}


class MolfMethod(MethodBase):
    """Mixture of LoRA and full: each module's update goes to its weight or to a LoRA expert (DESIGN.md section 2)."""

    kind: Literal["molf"]
    r: Annotated[list[Count], Field(min_length=1)]
    lora_alpha: Positive
    use_rslora: bool
    lora_dropout: Fraction
    exclude_modules: list[str]
    forward: Forward
    top_k: Count  # experts that win in each module and step
    score: Literal["epd", "pfn"]
    score_per: Scope = "module"  # else an ablation: one score over all modules of a layer, or of the model
    winners: Decider = "scores"  # else a control: what decides who wins in their place (docs/methods.md)
    learning_rate: Positive  # of the full weights and of everything outside the target modules
    lora_learning_rate: Positive
    weight_decay: NotNegative
    lora_weight_decay: NotNegative

    @model_validator(mode="after")
    def _fits(self) -> "MolfMethod":
        if self.top_k > len(self.r) + 1:
            raise ValueError(
                f"top_k is {self.top_k}, but there are {len(self.r) + 1} experts (the full weight included)"
            )
        if self.forward == "effective" and self.lora_dropout > 0:
            raise ValueError("forward: effective needs lora_dropout: 0; use forward: auto or dense")
        if problem := contradiction(self.winners, self.top_k, full=True, lora=len(self.r)):
            raise ValueError(problem)
        return self


class MolfEfficientMethod(MethodBase):
    """MoLF with a frozen base: each module's update goes to one of several LoRA experts."""

    adapter = True
    kind: Literal["molf-e"]
    r: Annotated[list[Count], Field(min_length=2)]
    lora_alpha: Positive
    use_rslora: bool
    lora_dropout: Fraction
    exclude_modules: list[str]
    top_k: Count
    score: Literal["epd", "pfn"]
    score_per: Scope = "module"  # as molf's
    winners: Decider = "scores"  # likewise, but for full and lora, which need the full weight as an expert
    learning_rate: Positive
    weight_decay: NotNegative

    @model_validator(mode="after")
    def _fits(self) -> "MolfEfficientMethod":
        if self.top_k > len(self.r):
            raise ValueError(f"top_k is {self.top_k}, but there are {len(self.r)} experts")
        if problem := contradiction(self.winners, self.top_k, full=False, lora=len(self.r)):
            raise ValueError(problem)
        return self


class AdaLoraMethod(MethodBase):
    """AdaLoRA by PEFT: adapters that begin too wide and are cut, in training, to a budget of ranks."""

    adapter = True
    kind: Literal["adalora"]
    target_r: Count  # mean rank of a module at the end
    init_r: Count  # rank of each at the start; the paper's is 1.5 times the end's
    lora_alpha: Positive  # the factor is alpha / init_r, from start to end
    lora_dropout: Fraction
    exclude_modules: list[str]
    tinit: Fraction  # share of the optimizer steps before the first cut
    tfinal: Fraction  # share of them after the last one
    deltaT: Count  # optimizer steps between two cuts
    beta1: Annotated[float, Field(gt=0, lt=1)]  # smoothing of the importance
    beta2: Annotated[float, Field(gt=0, lt=1)]  # smoothing of its uncertainty
    orth_reg_weight: NotNegative  # of the penalty that keeps P and Q near orthogonal
    learning_rate: Positive
    weight_decay: NotNegative

    @model_validator(mode="after")
    def _fits(self) -> "AdaLoraMethod":
        if self.init_r <= self.target_r:
            raise ValueError(
                f"init_r is {self.init_r}, target_r is {self.target_r}: there must be ranks to cut; the paper's init_r "
                f"is 1.5 times target_r, {-(-3 * self.target_r // 2)} here"
            )
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                f"tinit {self.tinit:g} and tfinal {self.tfinal:g} leave no step to cut ranks in; lower one"
            )
        return self

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        return {"fsdp": "a rank's importance is seen on whole gradients"}

    def brief(self) -> Self:
        return self.model_copy(update={"tinit": 0.0, "tfinal": 0.0, "deltaT": 1})


class EvaMethod(MethodBase):
    """LoRA by PEFT that begins at the directions of the data's activations, with ranks where these explain most."""

    adapter = True
    kind: Literal["eva"]
    r: Count  # mean rank of a module
    rho: Annotated[float, Field(ge=1)]  # a module's rank may be so many times r
    tau: Annotated[float, Field(gt=0, lt=1)]  # cosine from which a direction counts as settled between two batches
    use_label_mask: bool  # whether completions' tokens alone count, or all
    probe_steps: Count  # optimizer steps whose rows are looked at before the first one
    lora_alpha: Positive
    use_rslora: bool  # the factor is alpha / sqrt(r) instead of alpha / r, in every module whatever its own rank
    lora_dropout: Fraction
    exclude_modules: list[str]
    learning_rate: Positive
    weight_decay: NotNegative

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        return {"fsdp": "its ranks come from the data, and a copy of the whole model is made without"}


class SelectedMethod(MethodBase):
    """LoRA on the layers that a short gradient probe finds most important, with ranks by importance (docs/methods.md).

    Its budget is what uniform LoRA of rank `r` trains on all layers, or a share of that.
    """

    adapter = True
    kind: Literal["selected"]
    r: Count
    budget: Annotated[float, Field(gt=0, le=1)]  # share of uniform LoRA's trained parameters that is spent
    share: Annotated[float, Field(gt=0, le=1)]  # of the layers, rounded up: the most important ones get adapters
    probe_steps: Count  # optimizer steps whose examples the probe looks at, from the first on
    exponent: NotNegative  # of a module's importance, to which its rank is proportional; 0: ranks are alike
    lora_alpha: Positive
    use_rslora: bool  # scale alpha / sqrt(rank) instead of alpha / rank, of each module's own rank
    lora_dropout: Fraction
    exclude_modules: list[str]
    learning_rate: Positive
    weight_decay: NotNegative

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        return {"fsdp": "the whole model that is saved would be adapted anew, without the probe"}


MethodBlock = Annotated[
    FftMethod | LoraMethod | MolfMethod | MolfEfficientMethod | AdaLoraMethod | EvaMethod | SelectedMethod,
    Field(discriminator="kind"),
]

# The classes by their kinds.
KINDS: dict[str, type[MethodBase]] = {
    get_args(block.model_fields["kind"].annotation)[0]: block for block in get_args(get_args(MethodBlock)[0])
}

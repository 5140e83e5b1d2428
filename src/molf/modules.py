"""What the name of a model's module tells: its type, and the layer that it stands in."""


def layer(module: str) -> str:
    """Name of the layer that a module stands in: "model.layers.3.mlp.up_proj" -> "model.layers.3"; or ""."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def place(module: str) -> tuple[str, int]:
    """Type and layer of a module: "model.layers.3.mlp.up_proj" -> ("mlp.up_proj", 3); without a number, layer 0."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return parts[-1], 0
    return ".".join(parts[numbers[0] + 1 :]), int(parts[numbers[0]])

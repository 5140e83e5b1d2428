"""The blocks that params.yaml may hold below `methods`, one class for each kind."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from molf.blocks import Block, Count, Fraction, NotNegative, Positive
from molf.optim import Decider, Scope, contradiction


class MethodBase(Block):
    """What every method block may say."""

    def unfit(self) -> dict[Literal["ddp", "fsdp"], str]:
        """How several processes cannot share a cell of it, each with the reason; what works is not in it."""
        return {}


class FftMethod(MethodBase):
    """Full fine-tuning: every parameter with AdamW."""

    kind: Literal["fft"]
    learning_rate: Positive
    weight_decay: NotNegative


class LoraMethod(MethodBase):
    """One LoRA adapter by PEFT on all linear layers but the excluded."""

    kind: Literal["lora"]
    r: Count
    lora_alpha: Positive
    use_rslora: bool  # scale alpha / sqrt(r) instead of alpha / r
    lora_dropout: Fraction
    exclude_modules: list[str]
    learning_rate: Positive
    weight_decay: NotNegative


class MolfMethod(MethodBase):
    """Mixture of LoRA and full: each module's update goes to its weight or to a LoRA expert (DESIGN.md section 2)."""

    kind: Literal["molf"]
    r: Annotated[list[Count], Field(min_length=1)]
    lora_alpha: Positive
    use_rslora: bool
    lora_dropout: Fraction
    exclude_modules: list[str]
    forward: Literal["auto", "effective", "dense"]
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


MethodBlock = Annotated[FftMethod | LoraMethod | MolfMethod | MolfEfficientMethod, Field(discriminator="kind")]

"""A cell's model, loaded to be asked."""

from pathlib import Path

from molf import models
from molf.config import Params
from molf.errors import UserError
from molf.evaluation import LanguageModel
from molf.methods import METHODS
from molf.paths import BASE_METHOD, MODELS, Cell


def weights(cell: Cell) -> Path:
    """The folder of a cell's weights; the untrained model's are those of its base.

    Raises:
        UserError: They, or the base model, are not here; with the command that brings them.
    """
    base = MODELS / cell.model
    lacking = [folder for folder in (base, cell.weights) if not folder.is_dir()]
    if cell.method == BASE_METHOD:
        lacking = [folder for folder in lacking if folder == base]
    if lacking:
        listed = " ".join(map(str, lacking))
        raise UserError(f"{cell.name}: {listed.replace(' ', ' and ')} not here; `dvc pull {listed}`")
    return base if cell.method == BASE_METHOD else models.find_weights(cell.weights)


def load(cell: Cell, folder: Path, params: Params, progress: bool = False) -> LanguageModel:
    """A cell's model with its tokenizer, on the GPU where there is one.

    Args:
        cell: Trained, or the untrained model.
        folder: Of its weights, as `weights` finds it.
        params: With blocks for its task and method.
        progress: Whether long calls show a bar.
    """
    base, budget = MODELS / cell.model, params.training_for(cell.task)
    dtype = models.weight_dtype(budget.dtype)
    if cell.method == BASE_METHOD:
        network = models.load_model(folder, dtype)
    else:
        network = METHODS[params.methods[cell.method].kind].load(base, folder, dtype)
    models.to_device(network, budget.threads)
    return LanguageModel(network, models.load_tokenizer(base), params.evaluation.batch_size, progress)

"""`python -m molf.stages.code`: a hash of the code of each method of params.yaml.

What trains a cell depends on its method's value here, so that another method's code trains none of its cells anew.
"""

from molf import closure
from molf.config import load_params
from molf.errors import main
from molf.paths import CODE, write_json


def run() -> None:
    methods = load_params().methods
    write_json(CODE, {name: closure.code_hash(closure.of_method(block.kind)) for name, block in methods.items()})


if __name__ == "__main__":
    raise SystemExit(main(run))

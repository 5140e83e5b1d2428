"""The comparison under Prefect, which is imported after this: by then it knows that nothing is reported."""

from molf.paths import keep_private

keep_private()

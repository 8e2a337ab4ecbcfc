"""The order of releases, as PEP 440 has it: 1.0.dev1, 1.0a1, 1.0b1, 1.0rc1, 1.0, 1.0.post1, 1.1."""

import math
import re
from typing import Final, NamedTuple

_PARTS: Final = re.compile(
    r"(?:(\d+)!)?(\d+(?:\.\d+)*)(?:(a|b|rc)(\d+))?(?:\.post(\d+))?(?:\.dev(\d+))?(?:\+(.*))?", re.ASCII | re.DOTALL
)
_STAGES: Final = ("dev", "a", "b", "rc", "final")


class _Place(NamedTuple):
    epoch: int
    numbers: list[int]
    stage: int
    stage_number: int
    post: int
    dev: float
    local: list[int]


def is_newer(version: str, than: str) -> bool:
    """Tell whether a release comes after another. One that does not begin with a number comes before all others."""
    return _place_of(version) > _place_of(than)


def _place_of(version: str) -> _Place:
    found = _PARTS.match(version)
    if found is None:
        return _Place(-1, [], 0, 0, 0, 0, [])
    epoch, numbers, stage, stage_number, post, dev, local = found.groups()
    is_only_dev = dev is not None and stage is None and post is None
    return _Place(
        epoch=int(epoch or 0),
        numbers=_numbers(re.sub(r"(\.0+)+$", "", numbers)),  # 1.0 is 1
        stage=_STAGES.index("dev" if is_only_dev else stage or "final"),
        stage_number=int(stage_number or 0),
        post=-1 if post is None else int(post),
        dev=math.inf if dev is None else int(dev),  # what leads to a release comes before it
        local=_numbers(local or ""),
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", text)]

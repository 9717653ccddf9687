"""Terminal output of a run: no prints of third parties, and results as a small table."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

# CocoMetric's names, such as "coco/segm_mAP_50".
_AVERAGE_PRECISION = re.compile(r"(?:.*/)?(\w+)_mAP(?:_(\w+))?")
_COLUMNS = {"": "AP", "50": "AP50", "75": "AP75", "s": "small", "m": "medium", "l": "large"}
_ROWS = {"bbox": "box", "segm": "mask"}
_BRIEF = ("", "50")


@contextlib.contextmanager
def hidden_prints(verbose: bool = False) -> Iterator[None]:
    """Drop what is printed to ``sys.stdout``, unless ``verbose``.

    pycocotools and mmdet report there how they load and evaluate; a console that shall still be seen is made
    with ``file=sys.stdout`` beforehand.
    """
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            # mmdet misses an optional package at its import; mmseg announces defaults and their future.
            for message in ("faster_coco_eval is not", "Default ``avg_non_ignore`` is", "`reduce_zero_label` will be"):
                warnings.filterwarnings("ignore", message=message)
        yield


def brief(metrics: Mapping[str, float]) -> str:
    """``metrics`` in one line, of average precisions the two best known only."""
    parts = []
    for name, value in metrics.items():
        if match := _AVERAGE_PRECISION.fullmatch(name):
            kind, threshold = match[1], match[2] or ""
            if threshold in _BRIEF:
                parts.append(f"{_ROWS.get(kind, kind)} {_COLUMNS[threshold]} {_number(value)}")
        else:
            parts.append(f"{name.rsplit('/', 1)[-1]} {value:.4g}")
    return "  ".join(parts)


def print_average_precisions(metrics: Mapping[str, float]) -> None:
    """A table with a row for boxes and one for masks; nothing if ``metrics`` has no average precisions."""
    found = {name: match for name in metrics if (match := _AVERAGE_PRECISION.fullmatch(name))}
    kinds = dict.fromkeys(match[1] for match in found.values())
    if not kinds:
        return
    table = Table(box=None)
    for heading in ("", *_COLUMNS.values()):
        table.add_column(heading, justify="right")
    for kind in kinds:
        values = {match[2] or "": metrics[name] for name, match in found.items() if match[1] == kind}
        table.add_row(_ROWS.get(kind, kind), *(_number(values.get(column)) for column in _COLUMNS))
    Console(file=sys.stdout, highlight=False).print(table)


def _number(precision: float | None) -> str:
    # COCO's tools write -1 where there was nothing to find.
    return "-" if precision is None or precision < 0 else f"{precision:.3f}"

"""What every benchmark shares: paired statistics, the description of the machine, and where results go."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from langchain_aisp import __version__
from langchain_aisp.noise import fold, uniform

RESULTS = Path(__file__).parent / "results"


def bootstrap_interval(values: Sequence[float], *, statistic: str = "mean", draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean or median of paired differences or ratios; seeded."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = (uniform(fold(2026, torch.arange(draws * len(data)))) * len(data)).long().view(draws, -1)
    resampled = data[picks]
    found = resampled.mean(dim=1) if statistic == "mean" else resampled.median(dim=1).values
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def median_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Median, its 95 % interval and the number of values."""
    low, high = bootstrap_interval(values, statistic="median")
    return {"median": float(torch.tensor(values).median()), "low": low, "high": high, "pairs": len(values)}


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error, its 95 % interval and the number of values."""
    data = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(values)
    error = float(data.std() / len(data) ** 0.5) if len(data) > 1 else float("nan")
    return {"mean": float(data.mean()), "standard_error": error, "low": low, "high": high, "pairs": len(values)}


def environment() -> dict[str, Any]:
    """The machine and the versions, for a result that is read a year later."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": _command(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "langchain_aisp": __version__,
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write the result to ``results/DATE-name.json`` and print it as the last line."""
    record = {"benchmark": name, **environment(), **result}
    path = RESULTS / f"{record['date']}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def _command() -> str:
    """How the benchmark was called, folders by their names: where they lie on this machine is nobody's concern."""
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())

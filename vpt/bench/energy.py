"""Energy of a piece of work, where the machine has a meter for it."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def estimate(run: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """Result of `run`, and watt-hours of "cpu" and "gpu" meanwhile, each where a meter is.

    codecarbon reads the meters from time to time. They are of the whole machine, with whatever else
    runs on it. What codecarbon would guess without a meter is left out.
    """
    found = meters()
    if not found:
        return run(), {}
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="DEU",  # of the emissions, which nobody reads
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="error",
    )
    tracker.start()
    try:
        result = run()
    finally:
        tracker.stop()
    data = tracker.final_emissions_data
    return result, {part: 1e3 * getattr(data, f"{part}_energy") for part in found}


def meters() -> list[str]:
    """Meters of "cpu" (RAPL) and "gpu" (NVML, ROCm) that can be read; none without codecarbon."""
    try:
        from codecarbon.core.cpu import is_rapl_available
        from codecarbon.core.gpu import is_gpu_details_available
    except ModuleNotFoundError:
        return []
    there = {"cpu": is_rapl_available(), "gpu": is_gpu_details_available()}
    return [part for part, readable in there.items() if readable]

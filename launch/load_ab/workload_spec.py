"""What every workload of a plan has: a name, limits, and no key that nobody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sgl_hq.launch.load_ab.requests_file import Phase

MAX_TOKENS = 1 << 20  # of one request; far above what any model here takes
MAX_REQUESTS = 100_000


class WorkloadSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$", description="how rows and files call this workload")
    phases: tuple[Phase, ...] = Field(default=get_args(Phase), description="to be run, if the workload has them")

    @field_validator("phases")
    @classmethod
    def _begins_cold(cls, phases: tuple[str, ...]) -> tuple[str, ...]:
        if phases not in (("cold",), ("cold", "warm")):
            raise ValueError("give [cold] or [cold, warm]: a cache is warm only after a cold phase")
        return phases


class TextWorkloadSpec(WorkloadSpec):
    text: Path | None = Field(
        default=None, description="UTF-8 text that prompts are cut from, path from the working directory; default: the package's texts"
    )


def message(error: Any) -> str:
    """What is wrong, of one entry of `ValidationError.errors()`, without the words that pydantic puts before our own."""
    return error["msg"].removeprefix("Value error, ")

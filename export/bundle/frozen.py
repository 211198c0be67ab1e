"""What every record of the contract is made from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""An error, a share or a limit: NaN and infinity would let everything pass."""


class Frozen(BaseModel):
    """A record that does not change, and has no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

"""What every record of the contract is made from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A record that does not change, and has no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

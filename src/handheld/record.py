"""What every record that is written to disk or printed as JSON has in common."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable, and strict: an unknown field is an error, not a silent loss.

    Infinity has no JSON number: the PSNR of equal outputs is written as the string "Infinity".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

"""Types of single settings, with their ranges, and what every section shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vlarl_rllib.settings.published import absolute_path, absolute_unless_name

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000_000)]
Processes = Annotated[int, Field(ge=1, le=1024)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
"""What a float32 can be compared with."""
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
"""Of a term of the loss or the reward, which are float32."""
LearningRate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.01, le=1e6, allow_inf_nan=False)]
"""The system's own time-outs are milliseconds in 32 bits: 24 days."""
CPUs = Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16"]
DirectoryPath = Annotated[str, Field(min_length=1), AfterValidator(absolute_path)]
ModelPath = Annotated[str, Field(min_length=1), AfterValidator(absolute_unless_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as truth values, which pydantic would take for 1 and 0."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        items = value if isinstance(value, list) else [value]
        if bool not in (annotation, *get_args(annotation)) and any(isinstance(item, bool) for item in items):
            raise ValueError("true and false are no value of this key")
        return value

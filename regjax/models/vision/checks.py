"""What is asked of the models' fields and of their images, said in one way."""

from regjax.errors import InputError

ImageShape = tuple[int, int, int]
"""Height, width and channels."""


def require_positive(field: str, *values: int) -> None:
    if any(value < 1 for value in values):
        given = values[0] if len(values) == 1 else values
        raise InputError(f"{field} is {given}; expected at least 1.")


def require_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(f"{field} is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def require_sides(model: str, image_shape: ImageShape, least: int) -> None:
    height, width, _ = image_shape
    if min(height, width) < least:
        raise InputError(
            f"images are {height} by {width} pixels, too small for this {model}, which takes {least} "
            f"by {least} and more; use larger images, or a model that halves them less often."
        )

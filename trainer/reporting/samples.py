"""The samples section: predictions, confusion matrix, images and texts from `samples/`."""

import base64
import json
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from trainer.core.formatting import number
from trainer.errors import PerdureError
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts

FOLDER = "samples"
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_FILES = 48
_MOST_BYTES = 4 << 20
"""Maximum bytes of all images, so that the page can be mailed."""
_MOST_TEXT = 4000
_MOST_PREDICTIONS = 48
_MOST_CLASSES = 40
_ABSENT = (
    "This run has no samples. A finished run writes images, texts and predictions if its task "
    "has samples(); docs/report.md describes them."
)


def section(run: Facts) -> dict[str, Any]:
    """Return the content of `samples/`: predictions, confusion matrix, images and texts.

    Without content, `absent` has the reason.
    """
    try:
        names = [name for name in run.store.entries(FOLDER) if not name.endswith("/")]
    except PerdureError as error:
        return {"absent": f"{FOLDER}/ cannot be read: {error}"}
    if not names:
        return {"absent": _ABSENT}
    index, index_problem = _json(run, "index.json", names)
    predictions, predictions_problem = _json(run, "predictions.json", names)
    requested = index.get("files")
    shown_names = names
    if isinstance(requested, list):
        shown_names = [name for name in requested if isinstance(name, str) and name in names]
    step = index.get("step", predictions.get("step"))
    prediction_images = _own_images(predictions, shown_names)
    other_images = [name for name in shown_names if name not in prediction_images.values()]
    content = {
        "problems": [text for text in (index_problem, predictions_problem) if text],
        "predictions": _predictions(run, predictions, prediction_images),
        "confusion": _confusion(predictions),
        "images": _images(run, other_images),
        "texts": _texts(run, shown_names),
    }
    if not any(content.values()):
        return {"absent": f"{FOLDER}/ has no content that can be shown."}
    return {**content, "absent": "", "step": step if type(step) is int else None}


def _json(run: Facts, name: str, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return a file's newest object, and the error if the file exists and is unreadable."""
    if name not in names:
        return {}, ""
    try:
        content = json.loads(run.store.read(f"{FOLDER}/{name}"))
    except (ValueError, RecursionError, FileNotFoundError, PerdureError) as error:
        return {}, f"{FOLDER}/{name} cannot be read: {error}"
    newest = content[-1] if isinstance(content, list) and content else content
    if not isinstance(newest, dict):
        return {}, f"{FOLDER}/{name} has unknown content."
    return newest, ""


def _samples(predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = predictions.get("samples")
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _own_images(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[int, str]:
    """Return the image of each prediction: as stated there, else by the number in its name."""
    numbered = {
        int(match[1][-18:]): name
        for name in names
        if (match := re.fullmatch(r"\D*(\d+)\.png", name, re.ASCII)) is not None
    }
    content = {}
    for position, sample in enumerate(_samples(predictions)):
        named, index = sample.get("image"), sample.get("index")
        if isinstance(named, str) and named in names:
            content[position] = named
        elif type(index) is int and index in numbered:
            content[position] = numbered[index]
    return content


def _class(predictions: Mapping[str, Any], label: object) -> str:
    classes = predictions.get("classes")
    if isinstance(classes, list) and type(label) is int and 0 <= label < len(classes):
        return str(classes[label])
    return str(label)


def _predictions(
    run: Facts, predictions: Mapping[str, Any], images: Mapping[int, str]
) -> dict[str, Any] | None:
    samples = _samples(predictions)
    if not samples:
        return None
    cards = [
        _card(run, predictions, sample, images.get(position))
        for position, sample in enumerate(samples[:_MOST_PREDICTIONS])
    ]
    right = sum(one.get("label") == one.get("prediction") for one in samples)
    return {"right": right, "count": len(samples), "cards": cards}


def _card(
    run: Facts, predictions: Mapping[str, Any], sample: Mapping[str, Any], image: str | None
) -> dict[str, Any]:
    label, guess, probability = (sample.get(key) for key in ("label", "prediction", "probability"))
    percent = None
    if is_number(probability):
        percent = 100 * min(max(float(probability), 0.0), 1.0)  # type: ignore[arg-type]
    picture = _bytes(run, image) if image is not None else b""
    return {
        "index": sample.get("index"),
        "image": _image(picture, str(image)) if picture.startswith(_PNG) else None,
        "guess": _class(predictions, guess),
        "label": _class(predictions, label),
        "is_right": label == guess,
        "percent": percent,
    }


def _image(content: bytes, name: str) -> dict[str, Any]:
    width, height = struct.unpack(">II", content[16:24]) if len(content) >= 24 else (0, 0)
    base64_text = base64.b64encode(content).decode()
    return {"name": name, "base64": base64_text, "is_small": max(width, height) <= 128}


def _confusion(predictions: Mapping[str, Any]) -> dict[str, Any] | None:
    matrix = predictions.get("confusion")
    if not _is_square(matrix):
        return None
    assert isinstance(matrix, list)  # noqa: S101 (for the type checker)
    names = [_class(predictions, index) for index in range(len(matrix))]
    rows = [
        (names[index], [_cell(names, index, column, row) for column in range(len(row))])
        for index, row in enumerate(matrix[:_MOST_CLASSES])
    ]
    return {
        "names": names,
        "rows": rows if len(matrix) <= _MOST_CLASSES else [],
        "total": _total(predictions, matrix),
    }


def _cell(names: Sequence[str], index: int, column: int, row: Sequence[float]) -> dict[str, Any]:
    value, total = row[column], sum(row)
    fraction = value / total if total else 0.0
    return {
        "text": number(value) if value else "",
        "share": 100 * fraction**0.7,  # so that a few mistakes are seen
        "kind": ("right" if index == column else "wrong") + (" strong" if fraction > 0.5 else ""),
        "title": f"{names[index]}, predicted {names[column]}: {number(value)}",
    }


def _is_square(matrix: object) -> bool:
    return (
        isinstance(matrix, list)
        and bool(matrix)
        and all(
            isinstance(row, list)
            and len(row) == len(matrix)
            and all(is_number(value) and value >= 0 for value in row)
            for row in matrix
        )
    )


def _total(predictions: Mapping[str, Any], matrix: Sequence[Sequence[float]]) -> str:
    stored_count = predictions.get("confusion_samples")
    count = stored_count if type(stored_count) is int else sum(map(sum, matrix))
    return f"{number(count)} samples"


def _images(run: Facts, names: Sequence[str]) -> dict[str, Any] | None:
    images: list[dict[str, Any]] = []
    remaining_bytes, omitted = _MOST_BYTES, 0
    for name in (name for name in names if name.endswith(".png")):
        content = _bytes(run, name)
        if (
            len(images) >= _MOST_FILES
            or len(content) > remaining_bytes
            or not content.startswith(_PNG)
        ):
            omitted += 1
            continue
        remaining_bytes -= len(content)
        images.append(_image(content, name))
    return {"images": images, "omitted": omitted} if images or omitted else None


def _texts(run: Facts, names: Sequence[str]) -> list[tuple[str, str]]:
    texts = []
    for name in [name for name in names if name.endswith(".txt")][:_MOST_FILES]:
        text = _bytes(run, name).decode(errors="replace")
        texts.append((name, text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} …"))
    return texts


def _bytes(run: Facts, name: str) -> bytes:
    with suppress(FileNotFoundError, PerdureError):
        return run.store.read(f"{FOLDER}/{name}")
    return b""

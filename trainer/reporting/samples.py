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
from trainer.reporting.markup import Html, joined, tag

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


def draw(run: Facts) -> Html:
    """Return the content of `samples/`, or a sentence on how to get some."""
    try:
        names = [name for name in run.store.entries(FOLDER) if not name.endswith("/")]
    except PerdureError as error:
        return tag("p", f"{FOLDER}/ cannot be read: {error}", class_="none")
    if not names:
        return tag("p", _ABSENT, class_="none")
    index, index_problem = _json(run, "index.json", names)
    predictions, predictions_problem = _json(run, "predictions.json", names)
    requested = index.get("files")
    shown_names = names
    if isinstance(requested, list):
        shown_names = [name for name in requested if isinstance(name, str) and name in names]
    step = index.get("step", predictions.get("step"))
    when = tag("p", f"Taken at step {step:,}.", class_="hint") if type(step) is int else None
    prediction_images = _own_images(predictions, shown_names)
    other_images = [name for name in shown_names if name not in prediction_images.values()]
    problems = [
        tag("p", text, class_="hint") for text in (index_problem, predictions_problem) if text
    ]
    parts = [
        when,
        *problems,
        _predictions(run, predictions, prediction_images),
        _confusion(predictions),
        _images(run, other_images),
        _texts(run, shown_names),
    ]
    if not any(parts[1:]):
        return tag("p", "samples/ has no content that can be shown.", class_="none")
    return joined(parts)


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
) -> Html | None:
    samples = _samples(predictions)
    if not samples:
        return None
    cards = [
        _card(run, predictions, sample, images.get(position))
        for position, sample in enumerate(samples[:_MOST_PREDICTIONS])
    ]
    right = sum(one.get("label") == one.get("prediction") for one in samples)
    head = tag("h3", "Predictions ", tag("small", f"{right:,} of {len(samples):,} right"))
    return joined([head, tag("div", *cards, class_="cards")])


def _card(
    run: Facts, predictions: Mapping[str, Any], sample: Mapping[str, Any], image: str | None
) -> Html:
    label, guess, probability = (sample.get(key) for key in ("label", "prediction", "probability"))
    picture = _bytes(run, image) if image is not None else b""
    parts: list[object] = [_image(picture, str(image)) if picture.startswith(_PNG) else None]
    parts.append(tag("b", _class(predictions, guess)))
    if is_number(probability):
        percent = 100 * min(max(float(probability), 0.0), 1.0)  # type: ignore[arg-type]
        parts.append(tag("span", f"{percent:.1f} %", class_="share"))
        parts.append(tag("i", style=f"width:{percent:.1f}%"))
    is_right = label == guess
    if not is_right:
        parts.append(tag("span", f"is {_class(predictions, label)}", class_="truth"))
    kind = "card" if is_right else "card wrong"
    return tag("div", *parts, class_=kind, title=f"sample {sample.get('index')}")


def _image(content: bytes, name: str) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    width, height = struct.unpack(">II", content[16:24]) if len(content) >= 24 else (0, 0)
    small = "small" if max(width, height) <= 128 else None
    return tag("img", src=source, alt=name, title=name or None, class_=small)


def _confusion(predictions: Mapping[str, Any]) -> Html | None:
    matrix = predictions.get("confusion")
    if not _is_square(matrix):
        return None
    assert isinstance(matrix, list)  # noqa: S101 (for the type checker)
    count = len(matrix)
    head = tag(
        "h3",
        "Confusion matrix ",
        tag("small", f"rows: label; columns: prediction; {_total(predictions, matrix)}"),
    )
    if count > _MOST_CLASSES:
        return joined([head, tag("p", f"{count} classes are too many to draw.", class_="none")])
    names = [_class(predictions, index) for index in range(count)]
    rows = [tag("tr", tag("th"), *(tag("th", name) for name in names))]
    for position, (name, row) in enumerate(zip(names, matrix, strict=True)):
        cells = [
            _cell(value, sum(row), index == position, f"{name}, predicted {names[index]}")
            for index, value in enumerate(row)
        ]
        rows.append(tag("tr", tag("th", name), *cells))
    return joined([head, tag("div", tag("table", *rows, class_="confusion"), class_="scroll")])


def _cell(value: float, total: float, is_right: bool, title: str) -> Html:
    probability = value / total if total else 0.0
    kind = ("right" if is_right else "wrong") + (" strong" if probability > 0.5 else "")
    return tag(
        "td",
        number(value) if value else "",
        style=f"--share:{100 * probability**0.7:.1f}%",  # so that a few mistakes are seen
        class_=kind,
        title=f"{title}: {number(value)}",
    )


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


def _images(run: Facts, names: Sequence[str]) -> Html | None:
    elements: list[Html] = []
    remaining_bytes, omitted = _MOST_BYTES, 0
    for name in (name for name in names if name.endswith(".png")):
        content = _bytes(run, name)
        if (
            len(elements) >= _MOST_FILES
            or len(content) > remaining_bytes
            or not content.startswith(_PNG)
        ):
            omitted += 1
            continue
        remaining_bytes -= len(content)
        elements.append(tag("figure", _image(content, name), tag("figcaption", name)))
    if not elements and not omitted:
        return None
    hint = f"{omitted:,} more are in {FOLDER}/" if omitted else None
    more = tag("p", hint, class_="hint") if hint else None
    return joined([tag("h3", "Images"), tag("div", *elements, class_="images"), more])


def _texts(run: Facts, names: Sequence[str]) -> Html | None:
    elements = []
    for name in [name for name in names if name.endswith(".txt")][:_MOST_FILES]:
        text = _bytes(run, name).decode(errors="replace")
        cut = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} …"
        elements.append(tag("figure", tag("figcaption", name), tag("pre", cut)))
    if not elements:
        return None
    return joined([tag("h3", "Texts"), tag("div", *elements, class_="texts")])


def _bytes(run: Facts, name: str) -> bytes:
    with suppress(FileNotFoundError, PerdureError):
        return run.store.read(f"{FOLDER}/{name}")
    return b""

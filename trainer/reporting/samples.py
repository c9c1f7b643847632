"""What the model has made: predictions, a confusion matrix, images and texts from `samples/`."""

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
"""Of all images together; a page should stay one that can be sent to somebody."""
_MOST_TEXT = 4000
_MOST_PREDICTIONS = 48
_MOST_CLASSES = 40
_ABSENT = (
    "This run has left no samples. A finished run leaves some where its task has samples(): "
    "images, texts and predictions, as docs/report.md describes them."
)


def draw(run: Facts) -> Html:
    """Return what lies in `samples/`, or one sentence on how it would come there."""
    try:
        names = [name for name in run.store.entries(FOLDER) if not name.endswith("/")]
    except PerdureError as error:
        return tag("p", f"{FOLDER}/ cannot be read: {error}", class_="none")
    if not names:
        return tag("p", _ABSENT, class_="none")
    index, broken_index = _json(run, "index.json", names)
    told, broken_told = _json(run, "predictions.json", names)
    wanted = index.get("files")
    chosen = names
    if isinstance(wanted, list):
        chosen = [name for name in wanted if isinstance(name, str) and name in names]
    step = index.get("step", told.get("step"))
    when = tag("p", f"Taken at step {step:,}.", class_="hint") if type(step) is int else None
    own = _own_images(told, chosen)
    others = [name for name in chosen if name not in own.values()]
    broken = [tag("p", text, class_="hint") for text in (broken_index, broken_told) if text]
    parts = [
        when,
        *broken,
        _predictions(run, told, own),
        _confusion(told),
        _images(run, others),
        _texts(run, chosen),
    ]
    if not any(parts[1:]):
        return tag("p", "samples/ has nothing in it that can be shown.", class_="none")
    return joined(parts)


def _json(run: Facts, name: str, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return what a file says, the last of several, and why it cannot be read, if it is there."""
    if name not in names:
        return {}, ""
    try:
        found = json.loads(run.store.read(f"{FOLDER}/{name}"))
    except (ValueError, RecursionError, FileNotFoundError, PerdureError) as error:
        return {}, f"{FOLDER}/{name} cannot be read: {error}"
    newest = found[-1] if isinstance(found, list) and found else found
    if not isinstance(newest, dict):
        return {}, f"{FOLDER}/{name} has nothing in it that is known."
    return newest, ""


def _samples(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = told.get("samples")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _own_images(told: Mapping[str, Any], names: Sequence[str]) -> dict[int, str]:
    """Return which image shows which prediction: as it says, else by the number in the name."""
    numbered = {
        int(match[1][-18:]): name
        for name in names
        if (match := re.fullmatch(r"\D*(\d+)\.png", name, re.ASCII)) is not None
    }
    found = {}
    for place, sample in enumerate(_samples(told)):
        named, index = sample.get("image"), sample.get("index")
        if isinstance(named, str) and named in names:
            found[place] = named
        elif type(index) is int and index in numbered:
            found[place] = numbered[index]
    return found


def _class(told: Mapping[str, Any], label: object) -> str:
    classes = told.get("classes")
    if isinstance(classes, list) and type(label) is int and 0 <= label < len(classes):
        return str(classes[label])
    return str(label)


def _predictions(run: Facts, told: Mapping[str, Any], images: Mapping[int, str]) -> Html | None:
    samples = _samples(told)
    if not samples:
        return None
    cards = [
        _card(run, told, sample, images.get(place))
        for place, sample in enumerate(samples[:_MOST_PREDICTIONS])
    ]
    right = sum(one.get("label") == one.get("prediction") for one in samples)
    head = tag("h3", "Predictions ", tag("small", f"{right:,} of {len(samples):,} right"))
    return joined([head, tag("div", *cards, class_="cards")])


def _card(
    run: Facts, told: Mapping[str, Any], sample: Mapping[str, Any], image: str | None
) -> Html:
    label, guess, share = (sample.get(key) for key in ("label", "prediction", "probability"))
    picture = _bytes(run, image) if image is not None else b""
    parts: list[object] = [_image(picture, str(image)) if picture.startswith(_PNG) else None]
    parts.append(tag("b", _class(told, guess)))
    if is_number(share):
        percent = 100 * min(max(float(share), 0.0), 1.0)  # type: ignore[arg-type]
        parts.append(tag("span", f"{percent:.1f} %", class_="share"))
        parts.append(tag("i", style=f"width:{percent:.1f}%"))
    is_right = label == guess
    if not is_right:
        parts.append(tag("span", f"is {_class(told, label)}", class_="truth"))
    kind = "card" if is_right else "card wrong"
    return tag("div", *parts, class_=kind, title=f"sample {sample.get('index')}")


def _image(content: bytes, name: str) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    width, height = struct.unpack(">II", content[16:24]) if len(content) >= 24 else (0, 0)
    small = "small" if max(width, height) <= 128 else None
    return tag("img", src=source, alt=name, title=name or None, class_=small)


def _confusion(told: Mapping[str, Any]) -> Html | None:
    matrix = told.get("confusion")
    if not _is_square(matrix):
        return None
    assert isinstance(matrix, list)  # noqa: S101 (for the type checker)
    count = len(matrix)
    head = tag(
        "h3",
        "Confusion matrix ",
        tag("small", f"rows: what it is; columns: what was predicted; {_total(told, matrix)}"),
    )
    if count > _MOST_CLASSES:
        return joined([head, tag("p", f"{count} classes are too many to draw.", class_="none")])
    names = [_class(told, index) for index in range(count)]
    rows = [tag("tr", tag("th"), *(tag("th", name) for name in names))]
    for place, (name, row) in enumerate(zip(names, matrix, strict=True)):
        cells = [
            _cell(value, sum(row), index == place, f"{name}, predicted {names[index]}")
            for index, value in enumerate(row)
        ]
        rows.append(tag("tr", tag("th", name), *cells))
    return joined([head, tag("div", tag("table", *rows, class_="confusion"), class_="scroll")])


def _cell(value: float, whole: float, is_right: bool, what: str) -> Html:
    share = value / whole if whole else 0.0
    kind = ("right" if is_right else "wrong") + (" strong" if share > 0.5 else "")
    return tag(
        "td",
        number(value) if value else "",
        style=f"--share:{100 * share**0.7:.1f}%",  # so that a few mistakes are seen
        class_=kind,
        title=f"{what}: {number(value)}",
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


def _total(told: Mapping[str, Any], matrix: Sequence[Sequence[float]]) -> str:
    told_count = told.get("confusion_samples")
    count = told_count if type(told_count) is int else sum(map(sum, matrix))
    return f"{number(count)} samples"


def _images(run: Facts, names: Sequence[str]) -> Html | None:
    shown: list[Html] = []
    left_bytes, passed = _MOST_BYTES, 0
    for name in (name for name in names if name.endswith(".png")):
        content = _bytes(run, name)
        if len(shown) >= _MOST_FILES or len(content) > left_bytes or not content.startswith(_PNG):
            passed += 1
            continue
        left_bytes -= len(content)
        shown.append(tag("figure", _image(content, name), tag("figcaption", name)))
    if not shown and not passed:
        return None
    rest = f"{passed:,} more lie in {FOLDER}/" if passed else None
    more = tag("p", rest, class_="hint") if rest else None
    return joined([tag("h3", "Images"), tag("div", *shown, class_="images"), more])


def _texts(run: Facts, names: Sequence[str]) -> Html | None:
    shown = []
    for name in [name for name in names if name.endswith(".txt")][:_MOST_FILES]:
        text = _bytes(run, name).decode(errors="replace")
        cut = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} …"
        shown.append(tag("figure", tag("figcaption", name), tag("pre", cut)))
    if not shown:
        return None
    return joined([tag("h3", "Texts"), tag("div", *shown, class_="texts")])


def _bytes(run: Facts, name: str) -> bytes:
    with suppress(FileNotFoundError, PerdureError):
        return run.store.read(f"{FOLDER}/{name}")
    return b""

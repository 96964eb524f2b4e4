"""One picture that shows an attack and its cure: clean, triggered, answers before and after, found triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.pictures import as_image
from cbpt_guard.images import Pixels

_TILE, _GAP, _LINE, _LABEL = 128, 12, 18, 150
_INK, _PAPER, _BAD, _GOOD = (20, 20, 20), (255, 255, 255), (190, 20, 20), (10, 110, 40)


@dataclass(frozen=True)
class Column:
    """One example, uint8 (S, S, 3) clean and triggered, its true class, and the four answers."""

    truth: str
    clean: Pixels
    triggered: Pixels
    clean_before: str
    clean_after: str
    triggered_before: str
    triggered_after: str


def draw_poster(columns: Sequence[Column], bank: TriggerBank) -> Image.Image:
    """The picture; right answers are green, wrong ones red."""
    block = _TILE + 2 * _LINE + 2 * _GAP
    wide = _LABEL + max(len(columns), len(bank)) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (wide, 3 * block + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)

    def write(x: int, y: int, text: str, ink: tuple[int, int, int] = _INK) -> None:
        pen.text((x, y), text, fill=ink, font=font)

    for row, title in enumerate(("clean", "with the trigger", "found triggers")):
        write(_GAP, _GAP + row * block + _TILE // 2, title)
    for row in range(2):
        write(_GAP, _GAP + row * block + _TILE, "  answer before")
        write(_GAP, _GAP + row * block + _TILE + _LINE, "  answer guarded")
    for place, column in enumerate(columns):
        x = _LABEL + place * (_TILE + _GAP)
        rows = (
            (column.clean, column.clean_before, column.clean_after),
            (column.triggered, column.triggered_before, column.triggered_after),
        )
        for row, (pixels, before, after) in enumerate(rows):
            y = _GAP + row * block
            sheet.paste(_enlarged(Image.fromarray(pixels)), (x, y))
            for line, answer in enumerate((before, after)):
                write(x, y + _TILE + line * _LINE, answer, _GOOD if answer == column.truth else _BAD)
    for place, trigger in enumerate(bank):
        x, y = _LABEL + place * (_TILE + _GAP), _GAP + 2 * block
        sheet.paste(_enlarged(as_image(trigger, len(columns[0].clean))), (x, y))
        write(x, y + _TILE, trigger.family)
    return sheet


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize((_TILE, _TILE), Image.Resampling.NEAREST)

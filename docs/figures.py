"""Draw docs/framework.svg and docs/fusion_module.svg: the network, and one of its fusion modules.

    python docs/figures.py

Made for a phone's 390 pixels as for a wide page: 780 units wide, no text under 26 units.
"""

from math import atan2, cos, pi, sin
from pathlib import Path

INK, GREY, PAPER, COLUMN, EDGE = "#17202e", "#566173", "#f6f7fb", "#e9ecf3", "#c3cad7"
X, Y = "#c2184b", "#1d5fc4"  # what comes from img1 and from img2
SPATIAL, FREQUENCY, EXPERTS = "#146c43", "#6429c9", "#9a5200"
LIGHT = {SPATIAL: "#d9f2e2", FREQUENCY: "#e9e0fc", EXPERTS: "#fdebcb"}


class Figure:
    """An SVG of shapes, on a light page of its own; text is placed by its middle."""

    def __init__(self, height: int, title: str, desc: str):
        self.parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" width="780" '
            f'height="{height}" viewBox="0 0 780 {height}" role="img" '
            'aria-labelledby="title desc" font-family="Helvetica, Arial, sans-serif">',
            f'<title id="title">{title}</title>\n<desc id="desc">{desc}</desc>',
        ]
        self.rect((1, 1, 778, height - 2), PAPER, EDGE, 28)

    def path(self, d, fill="none", stroke="none", width=3.0, dash="none", alpha=1.0):
        style = f'stroke-width="{width}" stroke-dasharray="{dash}" stroke-opacity="{alpha:.2f}"'
        self.parts.append(f'<path d="{d}" fill="{fill}" stroke="{stroke}" {style}/>')

    def rect(self, box, fill="#fff", stroke="none", r=12, dash="none"):
        """A rectangle with round corners; a box is left, top, width and height."""
        x, y, w, h = box
        at = f'x="{x:g}" y="{y:g}" width="{w}" height="{h}" rx="{r}" stroke-width="2.5"'
        style = f'fill="{fill}" stroke="{stroke}" stroke-dasharray="{dash}"'
        self.parts.append(f"<rect {at} {style}/>")

    def text(self, at, lines, colour=INK, size=26, bold=0, anchor="middle"):
        """Lines around the point `at`, the first few of them bold."""
        x, y = at
        style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
        y += 0.35 * size - 16 * lines.count("\n")
        for k, line in enumerate(lines.split("\n")):
            place = f'x="{x:g}" y="{y + 32 * k:g}"' + ' font-weight="700"' * (k < bold)
            self.parts.append(f"<text {place} {style}>{line}</text>")

    def labelled(self, box, lines, colour=INK, bold=0, dash="none"):
        """A box with text in its middle."""
        x, y, w, h = box
        self.rect(box, stroke=colour, dash=dash)
        self.text((x + w / 2, y + h / 2), lines, bold=bold)

    def panel(self, box, colour, kind, name):
        """A part of the fusion module, under a band with its name."""
        x, y, w, h = box
        self.rect(box, colour, colour, 16)
        self.rect((x + 1, y + 88, w - 2, h - 89), LIGHT[colour], r=15)
        self.text((x + w / 2, y + 27), kind, "#fff")
        self.text((x + w / 2, y + 62), name, "#fff", 30, bold=1)

    def arrow(self, *points, colour=INK, dash="none"):
        """A line through the points, with the tip of its head on the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        u, v = (part(atan2(y1 - y0, x1 - x0)) for part in (cos, sin))
        line = (*points[:-1], (x1 - 13 * u, y1 - 13 * v))
        self.path(f"M{'L'.join(f'{a:g} {b:g}' for a, b in line)}", "none", colour, 3.5, dash)
        head = f"M{x1} {y1}l{-14 * u - 8 * v:g} {8 * u - 14 * v:g}l{16 * v:g} {-16 * u:g}z"
        self.path(head, colour)

    def maps(self, x, y, side, colour):
        for k in (6, 0, -6):
            self.rect((x - side / 2 + k, y - side / 2 - k, side, side), colour, PAPER, 4)

    def plus(self, x, y, colour):
        self.rect((x - 18, y - 18, 36, 36), stroke=colour, r=18)
        self.path(f"M{x - 9} {y}h18M{x} {y - 9}v18", stroke=colour)

    def head(self, x, y, bone, tissue):
        """A slice of a head around x, y: its bone as in CT, its tissue as in MRI."""
        self.rect((x - 52, y - 52, 104, 104), "#0b0e14", r=10)
        self.path(ring(x, y, 44), "#14181f", "#fff" if bone else "#6b7280", 7 if bone else 2.5)
        self.path(ring(x, y, 36, 0.03 * tissue, 20), "#858d9a" if tissue else "#474d57")
        self.path(ring(x, y, 26 * tissue, 0.1, 12), "#d3d8e0")
        self.path(f"M{x - 9} {y - 13}q10 14 0 27m18 0q-10 -13 0 -27", "none", "#14181f", 5)

    def save(self, name):
        Path(__file__).with_name(name).write_text("\n".join([*self.parts, "</svg>\n"]), "utf-8")


def ring(x, y, radius, depth=0.0, waves=0) -> str:
    """The path of a tall ellipse around x, y with a wavy edge."""
    turns = [(pi * k / 90, radius + radius * depth * sin(waves * pi * k / 90)) for k in range(180)]
    return f"M{'L'.join(f'{x + 0.84 * r * cos(a):.1f} {y + r * sin(a):.1f}' for a, r in turns)}z"


def framework() -> None:
    desc = """An encoder with shared weights, a fusion module at each of four scales, and a decoder
from the coarsest scale to the fused image; the compact size corrects a blend of both images."""
    f = Figure(982, "The framework of ASFE-Fusion", desc)
    columns = {20: 260, 310: 210, 560: 200}
    names = "Encoder\nshared weights", "Fusion\nfour modules", "Decoder\ncoarse to fine"
    for (x, w), name in zip(columns.items(), names, strict=True):
        f.rect((x, 306, w, 598), COLUMN, EDGE, 18)
        f.text((x + w / 2, 860), name, bold=1)
        if name != names[1]:
            f.rect((x, 20, w, 210), COLUMN, EDGE, 18)
    f.text((84, 64), "CT, PET,\nSPECT", X, bold=2)
    f.text((216, 64), "MRI", Y, bold=1)
    f.text((660, 64), "Fused\nimage", bold=2)
    for x, bone, tissue in ((84, True, False), (216, False, True), (660, True, True)):
        f.head(x, 162, bone, tissue)
    f.text((415, 64), "Compact size:", GREY)
    f.labelled((324, 114, 182, 96), "+ brighter\nsource", GREY, dash="9 6")
    f.arrow((280, 162), (324, 162), colour=GREY, dash="9 6")
    f.arrow((415, 210), (415, 268), (642, 268), colour=GREY, dash="9 6")
    scales = (52, "H", "H"), (40, "H/2", "H"), (30, "H/4", "H/2"), (22, "H/8", "H/4")
    for k, (side, scale, up) in enumerate(scales):
        top, y = 320 + 136 * k, 366 + 136 * k
        f.labelled((34, top, 232, 92), scale, bold=1)
        for x, name, s, colour in ((84, "x", -1, X), (216, "y", 1, Y)):
            f.arrow((x, top - 44 if k else 214), (x, top), colour=colour)
            f.maps(x, y, side, colour)
            f.arrow((266, y + 14 * s), (324, y + 14 * s), colour=colour)
            f.text((295, y + 34 * s), name, colour, bold=1)
        f.labelled((324, top, 182, 92), f"Module {k + 1}\n", bold=1)
        for i, colour in enumerate(LIGHT):
            f.rect((349 + 46 * i, y + 14, 40, 16), colour, r=5)
        f.arrow((506, y), (574, y), colour=EXPERTS)
        f.text((540, y - 24), f"z{k + 1}", EXPERTS, bold=1)
        f.labelled((574, top, 172, 92), f"up{k + 1}\nto {up}", bold=1)
        f.arrow((660, top), (660, top - 44 if k else 214))
    f.plus(660, 268, GREY)
    for x, name, colour in zip(columns, ("spatial", "frequency", "experts"), LIGHT, strict=True):
        f.rect((x + 14, 935, 40, 16), colour, r=5)
        f.text((x + 68, 943), name, anchor="start")
    f.save("framework.svg")


def fusion_module() -> None:
    desc = """CASF in space (self-similarity of one image, values of the other) and AFF in frequency
(FFT, mix, mask, inverse FFT), concatenated, enter SFEF: a soft mixture of experts over pixels."""
    f = Figure(1420, "One fusion module of ASFE-Fusion", desc)
    both_sources(f)
    spatial(f)
    frequency(f)
    for x, middle, out, colour in ((20, 170, 200, SPATIAL), (400, 610, 580, FREQUENCY)):
        f.arrow((out, 796), (out, 856), colour=colour)
        f.rect((x, 856, 360, 56), LIGHT[colour], colour)
        f.text((middle, 884), "C channels")
    f.labelled((320, 856, 140, 56), "concat", bold=1)
    f.arrow((390, 912), (390, 956))
    experts(f)
    f.arrow((390, 1300), (390, 1344), colour=EXPERTS)
    f.labelled((190, 1344, 400, 56), "fused map, 2C channels", EXPERTS, bold=1)
    f.save("fusion_module.svg")


def both_sources(f: Figure) -> None:
    for x, colour in ((110, X), (670, Y)):
        f.maps(x, 52, 48, colour)
        f.arrow((x, 82), (x, 172), colour=colour)
    f.arrow((670, 134), (290, 134), (290, 172), colour=Y)
    f.path("M490 124v20", stroke=PAPER, width=16)  # a gap where the two cross
    f.arrow((110, 108), (490, 108), (490, 172), colour=X)
    f.text((154, 52), "x\nCT / PET / SPECT", X, bold=1, anchor="start")
    f.text((626, 52), "y\nMRI", Y, bold=1, anchor="end")


def spatial(f: Figure) -> None:
    f.panel((20, 172, 360, 640), SPATIAL, "Spatial", "CASF(x, y)")
    f.text((200, 318), "Self-similarity A of\none image weighs the\nother's values v.")
    for x, colour in ((34, X), (210, Y)):
        f.rect((x, 378, 156, 96), stroke=colour)
        for k in range(9):  # patches, then the tokens that they become
            f.rect((x + 18 + k % 3 * 14, 392 + k // 3 * 14, 11, 11), colour, r=2)
            f.rect((x + 72 + k * 8, 392, 5, 39), colour, r=2)
        f.text((x + 78, 453), "tokens")
    nodes = (68, 68, "A1", X), (156, 244, "v1", X), (244, 156, "v2", Y), (332, 332, "A2", Y)
    for x, end, name, colour in nodes:
        f.arrow((x, 474), (x, 504), colour=colour)
        f.arrow((x, 560), (end, 622), colour=colour)
        f.labelled((x - 34, 504, 68, 56), name, colour, bold=1)
    for x, name in ((112, "A1 v2"), (288, "A2 v1")):
        f.arrow((x, 678), (x, 712), colour=SPATIAL)
        f.labelled((x - 78, 622, 156, 56), name, SPATIAL, bold=1)
    f.labelled((34, 712, 332, 84), "mean, laid back as\npatches, + x + y", SPATIAL)


def frequency(f: Figure) -> None:
    f.panel((400, 172, 360, 640), FREQUENCY, "Frequency", "AFF2(x) + AFF1(y)")
    f.text((580, 302), "One image's spectrum,\nmixed and masked.")
    for x, name, s, colour in ((492, "AFF2", 1, X), (668, "AFF1", -1, Y)):
        f.text((x, 358), name, colour, bold=1)
        for k, step in enumerate(("FFT", "mix", "mask", "inverse\nFFT")):
            f.labelled((x - 78, 378 + 95 * k, 156, 72), step, colour)
            if k:
                f.arrow((x, 355 + 95 * k), (x, 378 + 95 * k), colour=colour)
        f.arrow((x, 735), (x, 778), (580 - 18 * s, 778), colour=colour)
    f.plus(580, 778, FREQUENCY)


def experts(f: Figure) -> None:
    f.panel((20, 956, 740, 344), EXPERTS, "Experts: a soft mixture over the pixels", "SFEF")
    for i in range(8):
        x = 264 + 64 * i
        for j in range(4):
            soft = sin(2.3 * i + 1.9 * j * j) ** 2  # weights, made up
            lines = f"M{x} 1088L{288 + 133 * j} 1146M{288 + 133 * j} 1202L{x} 1260"
            f.path(lines, stroke=EXPERTS, width=round(1 + 2.5 * soft, 1), alpha=0.3 + 0.7 * soft)
        f.rect((x - 14, 1060, 14, 28), SPATIAL, r=3)
        f.rect((x, 1060, 14, 28), FREQUENCY, r=3)
        f.rect((x - 14, 1260, 28, 28), EXPERTS, r=3)
    for j, name in enumerate("12…E"):
        f.labelled((236 + 133 * j, 1146, 104, 56), name, EXPERTS, bold=1)
    for k, step in enumerate(("pixels", "dispatch", "E experts", "combine", "pixels")):
        f.text((46, 1074 + 50 * k), step, anchor="start")


if __name__ == "__main__":
    framework()
    fusion_module()

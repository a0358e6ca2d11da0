"""Golden numbers of plans of the family, and golden/plan.txt.

``python tests/golden_plan.py --regenerate`` writes both anew after a wanted change.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from plans import published_plan
from qwen35.model.sizes import PUBLISHED
from qwen35.planning.output_plan import Plan
from qwen35.planning.safetensors_files.safetensors_display import plan_text

Golden = tuple[int, int, int, int, int, int, str]

# golden: begin
GOLDEN: dict[str, dict[str, Golden]] = {
    "Qwen3.5-0.8B": {
        "nf4": (186, 302, 0, 0, 1_008_781_739, 2, "7f5bab9b7a99"),
        "text": (0, 335, 0, 153, 1_545_736_626, 2, "c8927b1f7dc3"),
        "text-nf4": (186, 149, 0, 153, 807_559_530, 2, "d88138a26df3"),
        "fp8": (157, 331, 0, 0, 1_231_659_926, 2, "a2399dfcb473"),
        "fp8-conservative": (139, 349, 0, 0, 1_269_402_592, 2, "bc87c8cb6c85"),
        "text-fp8": (157, 178, 0, 153, 1_030_446_310, 2, "17ecf9becf36"),
        "bf16": (0, 488, 0, 0, 1_746_945_118, 2, "b555704d9a86"),
    },
    "Qwen3.5-2B": {
        "nf4": (186, 446, 0, 0, 2_511_296_052, 2, "bab9aec184d8"),
        "text": (0, 335, 0, 297, 3_885_351_626, 2, "63b84cd2161d"),
        "text-nf4": (186, 149, 0, 297, 1_848_409_682, 2, "dd132d540ac2"),
        "fp8": (157, 475, 0, 0, 3_124_461_699, 2, "e41fcc87dc9d"),
        "fp8-conservative": (139, 493, 0, 0, 3_199_948_421, 2, "1a4693016343"),
        "text-fp8": (157, 178, 0, 297, 2_461_581_878, 2, "31852dc723ae"),
        "bf16": (0, 632, 0, 0, 4_548_224_007, 2, "1e16ac30800e"),
    },
    "Qwen3.5-4B": {
        "nf4": (248, 490, 0, 0, 4_023_319_489, 2, "42080e3457c3"),
        "text": (0, 441, 0, 297, 8_652_798_307, 4, "9dac66444088"),
        "text-nf4": (248, 193, 0, 297, 3_356_231_535, 2, "353042504354"),
        "fp8": (207, 531, 0, 0, 5_647_769_124, 4, "6ceb030460d9"),
        "fp8-conservative": (183, 555, 0, 0, 5_899_391_732, 4, "7b9d97c718c8"),
        "text-fp8": (207, 234, 0, 297, 4_980_602_431, 2, "ab86578e2c3e"),
        "bf16": (0, 738, 0, 0, 9_319_898_257, 4, "e80ea02ba900"),
    },
    "Qwen3.5-9B": {
        "nf4": (248, 527, 0, 0, 9_039_044_785, 4, "e8f696bdb02d"),
        "text": (0, 442, 0, 333, 18_394_284_640, 6, "c305b6c3b881"),
        "text-nf4": (248, 194, 0, 333, 8_126_908_585, 4, "c0c2337703f4"),
        "fp8": (207, 568, 0, 0, 12_185_383_593, 5, "5d89dc5d0a6b"),
        "fp8-conservative": (183, 592, 0, 0, 12_587_984_161, 5, "3059a9bc347a"),
        "text-fp8": (207, 235, 0, 333, 11_273_272_829, 5, "cdbd0edc8431"),
        "bf16": (0, 775, 0, 0, 19_306_384_083, 6, "436c0d010821"),
    },
    "Qwen3.5-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
    "Qwen3.5-35B-A3B": {
        "nf4": (350, 1_461, 0, 0, 69_813_650_740, 17, "6fd44e051ea3"),
        "text": (0, 1_478, 0, 333, 71_010_820_170, 18, "3465ecf94799"),
        "text-nf4": (350, 1_128, 0, 333, 68_920_369_124, 17, "fff36b7de95f"),
        "fp8": (31_745, 706, 0, 0, 37_470_879_167, 10, "5b2e7f1da1ed"),
        "fp8-conservative": (31_592, 859, 0, 0, 37_851_499_476, 10, "2c3f9bd2acd9"),
        "text-fp8": (31_745, 373, 0, 333, 36_575_791_737, 10, "0c20d00ab6b5"),
        "bf16": (0, 1_811, 0, 0, 71_904_049_187, 18, "9edfff35486a"),
    },
    "Qwen3.5-122B-A10B": {
        "nf4": (420, 1_529, 0, 0, 243_374_377_919, 52, "06c1db90fd27"),
        "text": (0, 1_616, 0, 333, 249_270_764_211, 64, "bbe5d0aa9468"),
        "text-nf4": (420, 1_196, 0, 333, 242_471_642_447, 52, "38eecc55fb45"),
        "fp8": (37_939, 778, 0, 0, 127_171_531_560, 28, "fb3b5b4c5ed1"),
        "fp8-conservative": (37_756, 961, 0, 0, 128_539_769_827, 28, "270dfc285d96"),
        "text-fp8": (37_939, 445, 0, 333, 126_266_634_376, 28, "b424d9e28bcf"),
        "bf16": (0, 1_949, 0, 0, 250_173_435_770, 64, "716e061674af"),
    },
    "Qwen3.5-397B-A17B": {
        "nf4": (525, 2_399, 0, 0, 795_464_300_708, 126, "ebf4ba609d8f"),
        "text": (0, 2_591, 0, 333, 805_884_396_337, 126, "13311fc38769"),
        "text-nf4": (525, 2_066, 0, 333, 794_552_104_344, 126, "404ffc54622f"),
        "fp8": (94_078, 886, 0, 0, 406_172_658_818, 84, "6dbec07292c8"),
        "fp8-conservative": (93_850, 1_114, 0, 0, 408_449_906_438, 84, "c24645705e0b"),
        "text-fp8": (94_078, 553, 0, 333, 405_254_996_463, 84, "034458edfddb"),
        "bf16": (0, 2_924, 0, 0, 806_796_513_753, 126, "ee8b7940e662"),
    },
    "Qwen3.8-2.4T-A95B": {
        "nf4": (805, 804, 0, 0, 4_826_292_495_238, 283, "7dff4a407f28"),
        "bf16": (0, 1_609, 0, 0, 4_892_365_821_983, 284, "b316a05ba60e"),
    },
    "Qwen3.6-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
    "Qwen3.6-35B-A3B": {
        "nf4": (350, 695, 0, 0, 69_813_490_717, 17, "386e2494bb83"),
        "text": (0, 712, 0, 333, 71_010_659_435, 18, "ce76a834edc4"),
        "text-nf4": (350, 362, 0, 333, 68_920_209_445, 17, "cde603c88a6b"),
        "fp8": (31_745, 706, 0, 0, 37_470_879_167, 10, "04482c2b0bd3"),
        "fp8-conservative": (31_592, 859, 0, 0, 37_851_499_476, 10, "3b3d1081e2b9"),
        "text-fp8": (31_745, 373, 0, 333, 36_575_791_737, 10, "a2b587cdf841"),
        "bf16": (0, 1_045, 0, 0, 71_903_888_452, 18, "37ffa18023a3"),
    },
    "Qwen3.8-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
}
# golden: end
"""Release and recipe to: weights encoded, copied, decoded, dropped; bytes; files; digest."""

PLANNED = ("nf4", "text", "text-nf4", "fp8", "fp8-conservative", "text-fp8", "bf16")
SIZES = [name for name in PUBLISHED if not name.endswith("-Base")]
_QUICK = {"Qwen3.8-2.4T-A95B": ("nf4", "bf16")}
"""FP8 of the largest is 288,000 tensors, seconds a plan."""
CASES = [(name, recipe) for name in SIZES for recipe in _QUICK.get(name, PLANNED)]


def golden(plan: Plan) -> Golden:
    """Return what the golden table holds of a plan."""
    ops = Counter(step.op for step in plan.steps)
    files = sum(1 for _ in plan.file_sizes())
    counts = (ops["nf4"] + ops["fp8"], ops["copy"], ops["decode"], ops["drop"])
    return (*counts, plan.nbytes, files, plan.digest[:12])


SHOWN = (("Qwen3.5-4B", "fp8"), ("Qwen3.5-0.8B", "text-nf4"), ("Qwen3.5-27B", "bf16"))
SHOWN_AS = Path(__file__).parent / "golden" / "plan.txt"


def shown_plans() -> str:
    """Return some plans as `qwen35 plan` prints them, with the same versions in all manifests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.planning.manifest.manifest_versions", lambda: {"qwen35": "1.2.3"})
        return "\n\n".join(plan_text(published_plan(*names), 2) for names in SHOWN) + "\n"


def regenerate() -> None:
    """Write the golden table of this file, and golden/plan.txt, anew."""
    SHOWN_AS.write_text(shown_plans(), "utf-8")
    rows = []
    for name in SIZES:
        cells = {recipe: golden(published_plan(n, recipe)) for n, recipe in CASES if n == name}
        lines = [f'        "{recipe}": ({_row(cell)}),' for recipe, cell in cells.items()]
        rows.append("\n".join([f'    "{name}": {{', *lines, "    },"]))
    table = "\n".join(["GOLDEN: dict[str, dict[str, Golden]] = {", *rows, "}"])
    path = Path(__file__)
    begin, end = "# golden: begin\n", "\n# golden: end"
    text = path.read_text()
    before, _, rest = text.partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2])


def _row(cell: Golden) -> str:
    return ", ".join([*(f"{value:_}" for value in cell[:-1]), f'"{cell[-1]}"'])


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/golden_plan.py --regenerate")
    regenerate()

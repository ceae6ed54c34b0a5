"""Values that a reader takes for the truth: SUV, HU, frames over time, and whose they are.

Expected SUV factors are worked out by hand in the tests, from QIBA's rule: weight in g over the dose
decayed to the time that the values are corrected to. Where a comment says so, z-rad 26.9.0 (PyPI)
gives the same for the same header; it is not needed here.
"""

import pydicom
import pytest
from dicom_files import injected
from pydicom.dataset import Dataset

from volumes.decay import NUCLIDES, nuclide_of
from volumes.suv import suv_factor

HALF_LIFE = 6586.2  # s, fluorine-18
SIEMENS = (0x0071, "SIEMENS MED PT", 0x22)
GE = (0x0009, "GEMS_PETD_01", 0x0D)


# --- SUV -------------------------------------------------------------------------------------


def pet(series, acquisition, injection="090000", own=None, **fields) -> Dataset:
    """70 kg and 400 MBq of fluorine-18; `own` is a private block and its time."""
    ds = Dataset()
    injected(ds)
    ds.Modality, ds.PatientWeight = "PT", "70"
    ds.SeriesTime, ds.AcquisitionTime = series, acquisition
    drug = ds.RadiopharmaceuticalInformationSequence[0]
    drug.RadiopharmaceuticalStartTime = injection
    if own:
        (group, creator, element), moment = own
        ds.private_block(group, creator, create=True).add_new(element, "DT", moment)
    for name, value in fields.items():
        setattr(drug if name.startswith("Radio") else ds, name, value)
    return ds


def by_hand(seconds: float) -> float:
    """g over Bq, the dose decayed for so many seconds."""
    return 70e3 / (400e6 * 2 ** (-seconds / HALF_LIFE))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        # z-rad gives 2.5561143e-4, 3.7335545e-4, 2.5561143e-4, 3.7335545e-4 and 2.4730772e-4
        (pet("130000", "105000", own=(SIEMENS, "20200131100000.000000")), 3600),
        (pet("104500", "110000", own=(GE, "20200131110000.00")), 7200),
        (
            pet(  # injected at 8:00 UTC, so at 9:00 by the scanner's clock
                "130000",
                "105000",
                own=(SIEMENS, "20200131100000"),
                RadiopharmaceuticalStartDateTime="20200131080000+0000",
                TimezoneOffsetFromUTC="+0100",
            ),
            3600,
        ),
        (
            pet(
                "104500",
                "110000",
                own=(GE, "20200131110000"),
                RadiopharmaceuticalStartDateTime="20200131090000",
            ),
            7200,
        ),
        (pet("130000", "001000", "231013.8", own=(SIEMENS, "20200131000500")), 3286.2),
        # a private time in another zone, as bytes of implicit VR, with only a clock; the scan's
        # date removed; a date of injection whose clock is in the other field
        (
            pet(
                "130000",
                "105000",
                own=(SIEMENS, "20200131090000+0000"),
                TimezoneOffsetFromUTC="+0100",
            ),
            3600,
        ),
        (pet("130000", "105000", own=(SIEMENS, b"20200131100000.000000 ")), 3600),
        (pet("130000", "105000", own=(GE, "100000")), 3600),
        (pet("130000", "100000", SeriesDate="", AcquisitionDate=""), 3600),
        (pet("100000", "100000", RadiopharmaceuticalStartDateTime="20200131"), 3600),
        # one that began before the injection, as a scan over time does
        (pet("085950", "085950"), -10),
        # DICOM's own field, in an enhanced file
        (pet("130000", "105000", DecayCorrectionDateTime="20200131100000"), 3600),
    ],
)
def test_suv_is_for_the_time_that_the_scanner_names(header, seconds):
    assert suv_factor([header])[0] == pytest.approx(by_hand(seconds), rel=1e-6)


def test_who_made_a_private_time_is_asked():
    """Another maker's field of the same number is none."""
    other = (0x0071, "SOMEONE ELSE", 0x22)
    factor, _ = suv_factor([pet("105000", "105000", own=(other, "20200131100000"))])
    assert factor == pytest.approx(by_hand(6600), rel=1e-6)
    header = pet("130000", "105000", own=(SIEMENS, "20200131100000"))
    del header[0x00710010]
    assert suv_factor([header])[0] == pytest.approx(by_hand(6600), rel=1e-6)
    header.Manufacturer = "SIEMENS"  # the creator's name alone was removed
    assert suv_factor([header])[0] == pytest.approx(by_hand(3600), rel=1e-6)


def test_without_it_the_earliest_counts_and_the_other_is_named():
    factor, line = suv_factor([pet("130000", t) for t in ("110500", "105000", "105500")])
    assert factor == pytest.approx(by_hand(6600), rel=1e-6)
    # 13:00 is 7800 s after 10:50: 2 ** (7800 / 6586.2) = 2.27
    assert line == (
        "SUV is for the first acquisition's time; the series' time is 130 minutes after it and "
        "would make it 2.27 times as high"
    )
    factor, line = suv_factor([pet("103000", "105000")])
    assert factor == pytest.approx(by_hand(5400), rel=1e-6)
    assert "SUV is for the series' time; the first acquisition's time is 20 minutes after" in line
    assert suv_factor([pet("105000", "105059")])[1] == ""


def test_a_note_on_the_time_reaches_the_volume(tmp_path):
    from dicom_files import write_series
    from volume_files import affine_of, numbered

    from volumes.dicom import read_dicom

    def late(ds, k):
        injected(ds)
        ds.SeriesTime = "020000"
        ds.private_block(*SIEMENS[:2], create=True).add_new(SIEMENS[2], "DT", "20200131010000")

    write_series(tmp_path, numbered(), affine_of("identity"), "PT", change=late)
    volume = read_dicom(tmp_path)
    assert volume.suv == pytest.approx(77.5e3 / 200e6, rel=1e-6)
    assert any(note.startswith("SUV is for the scanner's own start") for note in volume.notes)


def coded(value, scheme="SCT", meaning="") -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"RadionuclideTotalDose": "200"}, "dose is not between"),  # MBq
        ({"RadionuclideTotalDose": "2e12"}, "dose is not between"),
        ({"PatientWeight": "70000"}, "weight is not between"),  # g
        ({"PatientWeight": "0.2"}, "weight is not between"),
        ({"RadionuclideHalfLife": "109.8"}, "do not fit"),  # minutes
        (
            {"RadionuclideHalfLife": "1223", "RadionuclideCodeSequence": coded("77004003")},
            "half-life is not that of F-18",
        ),
        (
            {"RadionuclideHalfLife": "4062", "RadionuclideCodeSequence": coded("C-111A1", "SRT")},
            "half-life is not that of F-18",
        ),
        (
            {"RadionuclideCodeSequence": coded("1", "99LOCAL", "^68^Gallium")},
            "half-life is not that of Ga-68",
        ),
        ({"AcquisitionTime": "163000", "SeriesTime": "163000"}, "do not fit"),  # 4.1 half-lives
        ({"AcquisitionTime": "000000"}, "exactly midnight"),
        ({"SeriesTime": "000000.000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartTime": "000000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartDateTime": "20200131000000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartDateTime": "20190101090000"}, "do not fit"),
        ({"RadiopharmaceuticalStartTime": "105500"}, "do not fit"),  # after the scan
        ({"RadionuclideHalfLife": "282280"}, "no date of injection"),  # zirconium-89
        ({"DecayCorrection": "NONE"}, "neither START nor ADMIN"),
        ({"CorrectedImage": ["DECY", "RAN"]}, "not corrected for attenuation and decay"),
        ({"CorrectedImage": ["DECAY", "NORM"]}, "not corrected for attenuation"),
        ({"RadiopharmaceuticalStartTime": "", "SeriesTime": ""}, "no time of injection"),
    ],
)
def test_what_cannot_be_has_no_suv(fields, reason):
    factor, why = suv_factor([pet("100000", "100000", **fields)])
    assert factor is None and reason in why
    assert "70" not in why.replace("70000", ""), "no weight of a patient"


def test_what_can_be_just_has():
    at_most = {"RadionuclideTotalDose": "1e5", "PatientWeight": "0.5"}
    assert suv_factor([pet("100000", "100000", **at_most)])[0] > 0
    near = {"RadionuclideHalfLife": "6200", "RadionuclideCodeSequence": coded("77004003")}
    assert suv_factor([pet("100000", "100000", **near)])[0] > 0
    unknown = {"RadionuclideCodeSequence": coded("1", "99LOCAL", "something")}
    assert suv_factor([pet("100000", "100000", **unknown)])[0] > 0
    zirconium = {
        "RadionuclideHalfLife": "282280",
        "RadiopharmaceuticalStartDateTime": "20200127100000",
    }
    factor, _ = suv_factor([pet("100000", "100000", **zirconium)])
    assert factor == pytest.approx(70e3 / (400e6 * 2 ** (-4 * 86400 / 282280)), rel=1e-6)


def test_files_of_a_series_agree_on_dose_and_time():
    own = [(GE, f"202001311{n}0000") for n in (0, 1)]
    differing = [pet("100000", "100000", own=time) for time in own]
    assert "decayed to several times" in suv_factor(differing)[1]
    weights = [pet("100000", "100000", PatientWeight=w) for w in ("70", "71")]
    assert "differ in weight" in suv_factor(weights)[1]
    two = pet("100000", "100000")
    two.RadiopharmaceuticalInformationSequence = [Dataset(), Dataset()]
    assert "several injections" in suv_factor([two])[1]


def test_administration_needs_no_time():
    factor, line = suv_factor([pet("", "", "", DecayCorrection="ADMIN")])
    assert factor == pytest.approx(70e3 / 400e6) and not line


def test_nuclides_by_code_and_by_name():
    from pydicom.sr.codedict import codes

    for keyword, code in codes.cid4020.concepts.items():
        drug = Dataset()
        drug.RadionuclideCodeSequence = coded(code.value, code.scheme_designator)
        assert nuclide_of(drug) in NUCLIDES, keyword
        drug.RadionuclideCodeSequence = coded("", "", code.meaning)
        assert nuclide_of(drug).replace(" ", "") == keyword.strip("_"), keyword
    for meaning in ("F-18", "18F", "F18", "Fluor-18", "^18^Fluorine"):
        drug.RadionuclideCodeSequence = coded("", "", meaning)
        assert nuclide_of(drug) == "18 Fluorine", meaning
    assert nuclide_of(pydicom.Dataset()) == ""

"""Cohorts read from files: the published tables, and tiny ones made here."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from survfuse.data.bags import Bags
from survfuse.data.cohort_files import bags_of_slides, read_cohort
from survfuse.data.prepared import PreparedCohort
from survfuse.data.splits import read_splits


def test_the_honest_cohort_has_one_row_per_patient_and_one_table_per_type(shared_data):
    omics = shared_data / "tcga_omics"
    cohort = read_cohort(
        omics / "tcga_blca_all_clean.csv.zip", signatures=omics / "mcat_signatures.csv"
    )
    assert cohort.name == "tcga_blca"
    assert (len(cohort), int(cohort.event.sum())) == (373, 169)
    assert cohort.unit_ids == cohort.patient_ids
    assert cohort.channels() == {
        "rnaseq": ("table", 1554),
        "cnv": ("table", 256),
        "mut": ("table", 371),
    }
    groups = [cohort.modalities[kind].groups for kind in cohort.modalities]
    assert [sum(len(g[f]) for g in groups) for f in groups[0]] == [102, 336, 518, 434, 199, 444]
    clinical = cohort.covariate_matrix(["age", "is_female"])
    assert clinical[:, 0].min() == 34
    assert set(clinical[:, 1]) == {0, 1}
    # a spike of the raw table does not flatten the other patients
    rnaseq = cohort.modalities["rnaseq"]
    assert rnaseq.values.max() > 14_000
    column = list(rnaseq.features).index("AMELX_rnaseq")
    rest = rnaseq.values[:250, column] < 1000
    for clip, low, high in ((5.0, 0.5, 1.5), (None, 0.0, 0.05)):
        values = cohort.prepare(np.arange(250), clip=clip).table("rnaseq").values[:250, column]
        assert low <= float(values[rest].std()) < high


def test_the_healnet_cohort_is_the_released_one(shared_data):
    path = shared_data / "tcga_omics" / "tcga_kirp_all_clean.csv.zip"
    cohort = read_cohort(path, rows="slides", tables="healnet")
    assert (len(cohort), len(set(cohort.patient_ids))) == (284, 260)
    prepared = cohort.prepare(None, clip=None, scale="none")
    assert np.bincount(prepared.labels).tolist() == [43, 56, 113, 72]
    # an independent reading: fill by the mean of all rows, drop what is no feature
    raw = pd.read_csv(path, index_col=0, low_memory=False)
    drop = ["site", "oncotree_code", "case_id", "slide_id", "train"]
    raw = raw.drop(columns=[*drop, "censorship", "survival_months"])
    expected = torch.tensor(raw.fillna(raw.mean()).to_numpy(dtype=np.float32))
    assert prepared.features("omics") == tuple(raw.columns)
    assert torch.equal(prepared.table("omics").values, expected)


def test_merged_tables_leave_out_the_covariates(shared_data):
    path = shared_data / "tcga_omics" / "tcga_ucec_all_clean.csv.zip"
    assert read_cohort(path, tables="merged").channels() == {"omics": ("table", 1411)}
    assert read_cohort(path, tables="merged", types=["mut"]).channels() == {
        "omics": ("table", 1406)
    }
    with pytest.raises(ValueError, match=r"tcga_ucec.* has no rnaseq columns"):
        read_cohort(path, types=["rnaseq"])


def test_survpath_cohort_with_pathways_and_disease_specific_survival(shared_data):
    folder = shared_data / "survpath"
    rna = folder / "raw_rna_data" / "xena" / "blca" / "rna_clean.csv"
    cohort = read_cohort(
        rna,
        metadata=folder / "tcga_blca.csv",
        tables="signatures",
        signatures=folder / "xena_signatures.csv",
        endpoint="DSS",
    )
    assert (cohort.name, len(cohort), int(cohort.event.sum())) == ("blca", 359, 113)
    assert len(cohort.modalities["omics"].groups) == 281
    tested = [
        fold.rows(cohort.patient_ids).test for fold in read_splits(folder / "splits_tcga_blca")
    ]
    assert np.sort(np.concatenate(tested)).tolist() == list(range(359))
    with pytest.raises(ValueError, match=r"rows is 'slides'; SurvPath's expression"):
        read_cohort(rna, metadata=folder / "tcga_blca.csv", rows="slides")


def test_outcomes_of_tcga_cdr_replace_those_of_the_table(shared_data, tcga_cdr):
    path = shared_data / "tcga_omics" / "tcga_blca_all_clean.csv.zip"
    with pytest.raises(ValueError, match=r"DFI time or censorship is NaN for 199 rows"):
        read_cohort(path, outcomes=tcga_cdr, endpoint="DFI")
    cohort = read_cohort(path, outcomes=tcga_cdr, endpoint="DFI", missing_outcome="drop")
    assert len(cohort) == 174
    assert cohort.notes == ("199 rows without DFI were left out",)
    assert len(cohort.modalities["rnaseq"]) == 174


TABLE = """case_id,slide_id,survival_months,censorship,age,is_female,A_rnaseq
p1,s1.svs,10,0,50,1,0.5
p1,s2.svs,10,0,50,1,0.5
p2,s3.svs,20,1,60,0,1.5
p3,s4.svs,5,0,,1,-1
"""


@pytest.fixture
def files(tmp_path):
    """A table of three patients and bag files of three of their four slides."""
    (tmp_path / "tcga_tiny_all_clean.csv").write_text(TABLE)
    folder = tmp_path / "bags"
    folder.mkdir()
    for i, slide in enumerate(("s1", "s2", "s3", "unrelated")):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["features"] = np.full((2 + i, 4), i, dtype=np.float32)
            file["coords"] = np.full((2 + i, 2), 256 * i, dtype=np.int32)
            file["coords"].attrs["patch_size_level0"] = 512
    return tmp_path / "tcga_tiny_all_clean.csv", folder


def test_bags_of_a_folder_join_their_patients(files):
    table, folder = files
    cohort = read_cohort(table, bags=folder)
    assert cohort.present("slides").tolist() == [True, True, False]
    assert cohort.modalities["slides"].bags.names == ["s1", "s2", "s3"]
    batch = cohort.prepare(None, n_bins=2).batch([0, 1, 2]).inputs["slides"]
    assert batch.ragged.lengths.tolist() == [5, 4, 0]
    start = int(batch.ragged.starts[0])
    assert batch.features[start : start + 5, 0].tolist() == [0, 0, 1, 1, 1]
    assert batch.coords[start : start + 5, 0].tolist() == [0, 0, 256, 256, 256]
    assert cohort.modalities["slides"].bags.attributes["patch_size_level0"] == [512, 512, 512]
    assert "1 of 4 slides have no bag" in cohort.notes
    by_slide = read_cohort(table, rows="slides", bags=folder, bag_name="wsi")
    assert by_slide.unit_ids == ("s1", "s2", "s3", "s4")
    assert by_slide.present("wsi").tolist() == [True, True, True, False]


def test_bags_of_a_folder_may_be_empty_of_mixed_types_and_doubly_named(files):
    table, folder = files
    for name in ("s1.h5", "s2.h5"):
        (folder / name).unlink()
    np.save(folder / "s1.npy", np.zeros(0))  # TRIDENT's slide without tissue
    torch.save(torch.ones(3, 4).half(), folder / "s2.svs.pt")
    torch.save(torch.ones(1, 4).half(), folder / "s4.pth")
    cohort = read_cohort(table, bags=folder)
    bags = cohort.modalities["slides"]
    assert bags.n_patches.tolist() == [3, 4, 1]
    assert bags.bags.features.dtype == torch.float32
    assert not any("no bag" in note for note in cohort.notes)


def test_bags_of_a_store_join_their_patients(files, tmp_path):
    from survfuse.data.store import BagStore

    table, _ = files
    packed = Bags.from_list([torch.ones(2, 4), torch.zeros(3, 4)], ["s3", "s1"])
    BagStore.write(tmp_path / "store.h5", packed)
    cohort = read_cohort(table, bags=tmp_path / "store.h5")
    assert cohort.modalities["slides"].n_patches.tolist() == [3, 2, 0]


def test_bags_that_do_not_fit_are_named(files, tmp_path):
    table, folder = files
    with pytest.raises(FileNotFoundError, match=r"nowhere is neither a bag store nor a folder"):
        read_cohort(table, bags=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no bag file"):
        read_cohort(table, bags=empty)
    with pytest.raises(ValueError, match=r"none of 4 files .* is of a slide of the cohort"):
        bags_of_slides(folder, [("other",)])
    with pytest.raises(ValueError, match=r"none of 1 slides has a bag.*'other'"):
        bags_of_slides(Bags(torch.zeros(1, 2), [1], ["s1"]), [("other",)])
    torch.save(torch.zeros(3, 4), folder / "s1.pt")
    with pytest.raises(ValueError, match=r"s1\.h5 and .*s1\.pt are both of slide 's1'"):
        read_cohort(table, bags=folder)
    (folder / "s1.pt").unlink()
    with h5py.File(folder / "s4.h5", "w") as file:
        file["features"] = np.zeros((2, 7), dtype=np.float32)
    with pytest.raises(ValueError, match=r"bag 's4' has 7 features per patch and bag 's1' has 4"):
        read_cohort(table, bags=folder)


def test_a_patient_without_any_outcome_is_dropped(files):
    table, _ = files
    table.write_text(TABLE.replace("p2,s3.svs,20,1,", "p2,s3.svs,,,"))
    with pytest.raises(ValueError, match=r"OS time or censorship is NaN for 1 rows of .*: 'p2'"):
        read_cohort(table)
    cohort = read_cohort(table, missing_outcome="drop")
    assert cohort.unit_ids == ("p1", "p3")
    assert cohort.event.tolist() == [True, True]


def test_a_patient_without_any_outcome_is_kept_to_be_scored(files):
    table, _ = files
    table.write_text(TABLE.replace("p2,s3.svs,20,1,", "p2,s3.svs,,,"))
    cohort = read_cohort(table, missing_outcome="keep")
    assert cohort.unknown_outcome
    assert cohort.unit_ids == ("p1", "p2", "p3")
    assert np.isnan(cohort.time).tolist() == [False, True, False]
    assert cohort.event.tolist() == [True, False, True]
    assert cohort.notes[-1] == "1 rows have no known OS"
    assert cohort.summary()["median_time"] > 0
    with pytest.raises(ValueError, match="a survival time must be known"):
        cohort.prepare([0, 2])
    state = read_cohort(table, missing_outcome="drop").prepare(None, n_bins=2).state
    assert PreparedCohort.from_state(cohort, state).labels.tolist()[1] == -1


def test_wrong_choices_name_the_nearest(files):
    table, _ = files
    with pytest.raises(ValueError, match=r"unknown rows 'patient'; did you mean 'patients'"):
        read_cohort(table, rows="patient")
    with pytest.raises(ValueError, match=r"unknown tables 'bytype'.*did you mean 'by_type'"):
        read_cohort(table, tables="bytype")
    with pytest.raises(ValueError, match=r"needs a file of gene groups"):
        read_cohort(table, tables="signatures")
    with pytest.raises(ValueError, match=r"missing_outcome is 'zero'"):
        read_cohort(table, missing_outcome="zero")
    with pytest.raises(FileNotFoundError, match=r"missing\.csv does not exist"):
        read_cohort(table.with_name("missing.csv"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("p2,s3.svs,20,1", "p2,s3.svs,20,", r"OS time or censorship is NaN for 1 rows of .*: 'p2'"),
        ("p2,s3.svs,20,", "p2,s3.svs,,", r"OS time or censorship is NaN for 1 rows of .*: 'p2'"),
        ("p2,s3.svs,20,", "p2,s3.svs,-20,", r"OS time at row 1 \(p2\) is -20; .*at least 0"),
        ("p2,s3.svs,20,1", "p2,s3.svs,20,3", r"censorship at row 1 \(p2\) is 3"),
    ],
)
def test_wrong_outcomes_in_a_file_name_column_row_and_unit(files, old, new, message):
    table, _ = files
    table.write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_cohort(table)


def test_a_cohort_of_censored_patients_cannot_be_prepared(files):
    table, _ = files
    table.write_text(TABLE.replace(",10,0,", ",10,1,").replace(",5,0,", ",5,1,"))
    with pytest.raises(ValueError, match=r"is censored; time bins need at least one row"):
        read_cohort(table).prepare(None)

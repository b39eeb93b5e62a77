"""Omics tables of TCGA and SurvPath, gene groups, endpoints, and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from survfuse.data.omics import OmicsTable, read_signatures, site_codes, strip_slide_suffix
from survfuse.data.outcomes import endpoint_columns, read_tcga_cdr
from survfuse.data.preprocessing import TablePreprocessor

COLUMNS = (
    ",case_id,slide_id,age,site,survival_months,censorship,is_female,oncotree_code,train,"
    "A_rnaseq,B_rnaseq,A_cnv,A_mut\n"
)
SMALL = (
    COLUMNS
    + """0,TCGA-05-0001,s1.svs,60,5,10.0,0,1,X,1,0.5,-1,0,1
1,TCGA-05-0001,s2.svs,60,5,10.0,0,1,X,1,0.5,-1,0,1
2,TCGA-AB-0002,s3.svs,,AB,20.0,1,0,X,1,1.5,2,-2,0
"""
)


def write(tmp_path: Path, text: str, name: str = "tcga_x_all_clean.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# sizes of the six gene families, as the released MCAT-style loaders count them
FAMILIES = {
    "blca": (437, 373, (1554, 256, 371), [102, 336, 518, 434, 199, 444]),
    "kirp": (284, 260, (1557, 0, 20), [83, 306, 496, 415, 135, 424]),
    "ucec": (538, 480, (0, 5, 1406), [20, 63, 78, 28, 150, 9]),
}


@pytest.mark.parametrize("cohort", FAMILIES)
def test_published_tables_have_their_known_sizes(shared_data, cohort):
    slides, patients, types, families = FAMILIES[cohort]
    table = OmicsTable.from_tcga(shared_data / "tcga_omics" / f"tcga_{cohort}_all_clean.csv.zip")
    assert len(table) == slides
    assert len(table.by_patient()) == patients
    assert tuple(len(table.types.get(kind, ())) for kind in ("rnaseq", "cnv", "mut")) == types
    groups = table.signatures(shared_data / "tcga_omics" / "mcat_signatures.csv")
    assert [len(columns) for columns in groups.values()] == families
    assert not table.values.isna().any().any()
    if types[0] == 0:
        with pytest.raises(ValueError, match=r"has no rnaseq columns; it has 'cnv', 'mut'"):
            table.block("rnaseq")


def test_sites_keep_the_leading_zero_that_the_column_lost(shared_data):
    table = OmicsTable.from_tcga(shared_data / "tcga_omics" / "tcga_luad_all_clean.csv.zip")
    assert table.metadata["site"].iloc[0] == "05"
    assert site_codes(["TCGA-2F-A9KO", "other"], ["5", 7]) == ["2F", "7"]


def test_survpath_expression_joins_its_metadata(shared_data):
    folder = shared_data / "survpath"
    rna = folder / "raw_rna_data" / "xena" / "blca" / "rna_clean.csv"
    table = OmicsTable.from_survpath(rna, metadata=folder / "tcga_blca.csv")
    assert table.values.shape == (359, 1577)
    assert sum(len(slides) for slides in table.metadata["slide_ids"]) == 423
    assert table.metadata.loc["TCGA-2F-A9KP", "slide_ids"][0].startswith("TCGA-2F-A9KP-01Z-00-DX1")
    pathways = table.signatures(folder / "xena_signatures.csv")
    assert len(pathways) == 281
    lengths = [len(genes) for genes in pathways.values()]
    assert (min(lengths), max(lengths)) == (1, 69)
    # DSS of the SurvPath paper's cohort: 113 events
    assert endpoint_columns(table.metadata, endpoint="DSS")["event"].sum() == 113
    alone = OmicsTable.from_survpath(rna)
    assert len(alone) == 360


def test_several_samples_of_a_case_are_averaged_and_noted(tmp_path, shared_data):
    path = write(tmp_path, ",G,H\nTCGA-AA-1,1,5\nTCGA-AA-2,0,0\nTCGA-AA-1,3,6\n", "rna.csv")
    table = OmicsTable.from_survpath(path)
    assert table.values.loc["TCGA-AA-1"].tolist() == [2, 5.5]
    assert table.values.index.tolist() == ["TCGA-AA-1", "TCGA-AA-2"]
    assert "1 cases have several expression samples" in table.notes[0]
    first = OmicsTable.from_survpath(path, repeated="first")
    assert first.values.loc["TCGA-AA-1"].tolist() == [1, 5]
    with pytest.raises(ValueError, match=r"case 'TCGA-AA-1' occurs twice"):
        OmicsTable.from_survpath(path, repeated="error")
    with pytest.raises(ValueError, match=r"repeated is 'median'"):
        OmicsTable.from_survpath(path, repeated="median")
    folder = shared_data / "survpath"
    rna = folder / "raw_rna_data" / "xena" / "coadread" / "rna_clean.csv"
    real = OmicsTable.from_survpath(rna, metadata=folder / "tcga_coadread.csv")
    assert "3 cases" in real.notes[0]
    assert real.notes[1] == "2 cases without expression were left out"
    assert not real.values.index.has_duplicates


def test_slide_rows_of_a_patient_become_one_row(tmp_path):
    table = OmicsTable.from_tcga(write(tmp_path, SMALL)).by_patient()
    assert table.values.index.tolist() == ["TCGA-05-0001", "TCGA-AB-0002"]
    assert table.metadata["slide_ids"].tolist() == [("s1", "s2"), ("s3",)]
    assert table.metadata["site"].tolist() == ["05", "AB"]
    assert table.block("cnv").to_numpy().tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize(
    ("old", "new", "column"),
    [("1,TCGA-05-0001,s2.svs,60,5,10.0", "1,TCGA-05-0001,s2.svs,60,5,11.0", "survival_months"),
     ("1,0.5,-1,0,1\n2", "1,0.5,-7,0,1\n2", "B_rnaseq")],
)  # fmt: skip
def test_slide_rows_that_disagree_name_patient_and_column(tmp_path, old, new, column):
    table = OmicsTable.from_tcga(write(tmp_path, SMALL.replace(old, new)))
    with pytest.raises(ValueError, match=f"case 'TCGA-05-0001' differ in column '{column}'"):
        table.by_patient()


def test_columns_without_suffix_are_mutations_or_an_error(tmp_path):
    old_style = SMALL.replace("A_mut", "A")
    assert OmicsTable.from_tcga(write(tmp_path, old_style)).types["mut"] == ("A",)
    with pytest.raises(ValueError, match=r"column 'B' is neither metadata nor omics"):
        OmicsTable.from_tcga(write(tmp_path, SMALL.replace("B_rnaseq", "B")))


def test_bad_tables_name_the_file_and_the_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist"):
        OmicsTable.from_tcga(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist"):
        read_signatures(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"has no column 'censorship'"):
        OmicsTable.from_tcga(write(tmp_path, SMALL.replace("censorship", "status")))
    with pytest.raises(ValueError, match=r"slide 's1' occurs twice"):
        OmicsTable.from_tcga(write(tmp_path, SMALL.replace("s2.svs", "s1.svs")))
    with pytest.raises(ValueError, match=r"column 'B_rnaseq' holds something that is not a number"):
        OmicsTable.from_tcga(write(tmp_path, SMALL.replace(",1.5,2,-2", ",1.5,high,-2")))


def test_unknown_names_come_with_the_nearest_valid_one(tmp_path):
    table = OmicsTable.from_tcga(write(tmp_path, SMALL))
    assert table.columns(["A_mut", "A_cnv"]).to_numpy()[2].tolist() == [0, -2]
    with pytest.raises(ValueError, match=r"unknown column 'A_rnasq'.*did you mean 'A_rnaseq'"):
        table.columns(["A_rnasq"])
    with pytest.raises(ValueError, match=r"unknown omic type 'RNAseq'.*did you mean 'rnaseq'"):
        table.block("RNAseq")
    with pytest.raises(ValueError, match=r"no gene of .*genes\.csv is in"):
        table.signatures(write(tmp_path, "set\nQ\n", "genes.csv"))


def test_groups_hold_every_column_of_their_genes(tmp_path):
    table = OmicsTable.from_tcga(write(tmp_path, SMALL))
    genes = write(tmp_path, "one,two\nA,B\n A,A\n,Q\n", "genes.csv")
    assert table.signatures(genes) == {
        "one": ("A_cnv", "A_mut", "A_rnaseq"),
        "two": ("A_cnv", "A_mut", "A_rnaseq", "B_rnaseq"),
    }


def test_only_known_suffixes_are_cut_from_slide_ids():
    # released loaders strip the characters of ".svs" and shorten such a name
    assert strip_slide_suffix("TCGA.vss.svs") == "TCGA.vss"
    assert strip_slide_suffix("TCGA-DX1.195576CF") == "TCGA-DX1.195576CF"


def test_tcga_cdr_agrees_with_the_table_of_the_cohort(shared_data):
    cdr = read_tcga_cdr(shared_data / "tcga_cdr" / "outcome.xlsx", endpoint="OS")
    table = OmicsTable.from_tcga(shared_data / "tcga_omics" / "tcga_blca_all_clean.csv.zip")
    ours = endpoint_columns(table.by_patient().metadata)
    theirs = cdr.loc[ours.index]
    assert (ours["event"] == theirs["event"]).all()
    assert (ours["time"] - theirs["time"]).abs().max() < 0.02
    assert cdr.loc["TCGA-OR-A5J2", "is_female"] == 1


def test_endpoints_that_do_not_exist_are_named(tmp_path):
    table = OmicsTable.from_tcga(write(tmp_path, SMALL))
    with pytest.raises(ValueError, match=r"unknown endpoint 'os'; did you mean 'OS'"):
        endpoint_columns(table.metadata, endpoint="os")
    with pytest.raises(ValueError, match=r"no column 'survival_months_dss', which endpoint DSS"):
        endpoint_columns(table.metadata, endpoint="DSS")
    with pytest.raises(FileNotFoundError, match=r"outcome.xlsx does not exist"):
        read_tcga_cdr(tmp_path / "outcome.xlsx")
    with pytest.raises(ValueError, match=r"unknown endpoint 'OSS'"):
        read_tcga_cdr(write(tmp_path, "a\n1\n", "cdr.csv"), endpoint="OSS")
    with pytest.raises(ValueError, match=r"cdr\.csv lacks the columns 'bcr_patient_barcode'"):
        read_tcga_cdr(write(tmp_path, "a\n1\n", "cdr.csv"))


# ---- preprocessing


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    table = rng.normal(2, 3, (60, 4))
    table[5, 0] = np.nan
    table[7, 1] = 36_893.0  # the largest expression z-score of TCGA-BRCA
    table[:, 2] = rng.random(60) < 0.1
    table[:, 3] = 4.0
    return table


NAMES = ("gene", "wild", "mutation", "constant")
TRAIN = np.arange(40)


def test_statistics_come_from_the_training_rows_alone(values):
    fitted = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN)
    changed = values.copy()
    changed[40:] = changed[40:] * 100 + 5
    again = TablePreprocessor.fit(changed, features=NAMES, rows=TRAIN)
    assert fitted.state() == again.state()
    assert TablePreprocessor.fit(changed, features=NAMES).state() != fitted.state()


def test_training_rows_get_mean_zero_and_variance_one_in_spite_of_a_spike(values):
    fitted = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN)
    out = fitted.transform(values)
    assert out.dtype == np.float32
    assert out[TRAIN].mean(0) == pytest.approx(0, abs=1e-6)
    assert out[TRAIN, :3].std(0) == pytest.approx(1, abs=1e-5)
    assert (out[:, 3] == 0).all()
    assert np.abs(out[:, 1]).max() < 6
    # without clipping the spike flattens every other row
    spiked = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN, clip=None)
    assert np.abs(np.delete(spiked.transform(values)[:, 1], 7)).max() < 0.2


def test_clipping_limits_are_robust_deviations_around_the_median(values):
    fitted = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN, clip=2.0, scale="none")
    q1, middle, q3 = np.percentile(values[TRAIN, 1], [25, 50, 75])
    reach = 2 * (q3 - q1) / 1.3489795003921634
    assert fitted.high[1] == pytest.approx(middle + reach)
    assert fitted.low[1] == pytest.approx(middle - reach)
    assert fitted.transform(values)[7, 1] == pytest.approx(middle + reach)
    # a mutation keeps two values, a constant has no limit
    assert len(np.unique(fitted.transform(values)[:, 2])) == 2
    assert np.isinf(fitted.high[3])


@pytest.mark.parametrize(("impute", "average"), [("mean", np.nanmean), ("median", np.nanmedian)])
def test_nan_becomes_the_training_average(values, impute, average):
    fitted = TablePreprocessor.fit(
        values, features=NAMES, rows=TRAIN, impute=impute, clip=None, scale="none"
    )
    assert fitted.transform(values)[5, 0] == pytest.approx(average(values[TRAIN, 0]))
    assert TablePreprocessor.fit(
        values, features=NAMES, impute="zero", clip=None, scale="none"
    ).transform(values)[5, 0] == 0  # fmt: skip


def test_a_column_unknown_in_training_becomes_zero(values):
    values[:40, 0] = np.nan
    out = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN).transform(values)
    assert np.isfinite(out).all()
    assert (out[TRAIN, 0] == 0).all()


def test_selection_keeps_the_columns_of_largest_training_variance(values):
    fitted = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN, select=2)
    assert fitted.names == ("gene", "wild")
    assert fitted.transform(values).shape == (60, 2)
    full = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN).transform(values)
    assert np.array_equal(fitted.transform(values), full[:, :2])


def test_state_survives_json_to_the_last_bit(values):
    for clip in (None, 3.0):
        fitted = TablePreprocessor.fit(values, features=NAMES, rows=TRAIN, clip=clip, select=3)
        state = json.loads(json.dumps(fitted.state(), allow_nan=False))
        again = TablePreprocessor.from_state(state)
        assert np.array_equal(again.transform(values), fitted.transform(values))
        assert again.state() == fitted.state()


def test_the_released_treatment_fills_from_all_rows_and_changes_nothing_else(values):
    out = TablePreprocessor.raw(values, features=NAMES).transform(values)
    known = ~np.isnan(values)
    assert np.array_equal(out[known], values[known].astype(np.float32))
    assert out[5, 0] == np.float32(np.nanmean(values[:, 0]))


def test_wrong_preprocessing_arguments(values):
    def fit(**changes):
        return TablePreprocessor.fit(values, **{"features": NAMES, "rows": TRAIN, **changes})

    with pytest.raises(ValueError, match=r"impute is 'knn'; it must be one of 'mean'"):
        fit(impute="knn")
    with pytest.raises(ValueError, match=r"scale is 'minmax'"):
        fit(scale="minmax")
    with pytest.raises(ValueError, match=r"clip is -1"):
        fit(clip=-1)
    with pytest.raises(ValueError, match=r"select is 0"):
        fit(select=0)
    with pytest.raises(ValueError, match=r"must be \[rows, 1\]"):
        fit(features=("a",))
    with pytest.raises(ValueError, match=r"none of the training rows holds a value"):
        TablePreprocessor.fit(values * np.nan, features=NAMES)
    values[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"infinite at row 3, feature 'wild'"):
        fit()

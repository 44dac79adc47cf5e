"""What makes a corpus impossible, and the tool that draws one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.errors import DataError
from data.shards import ShardFolder
from tests.support.corpus_sets import (
    AI2D_FILE,
    RECIPE,
    draw,
    mmfinereason_row,
    small_recipe,
    student_config,
    vero_row,
    write_sets,
)
from tests.support.tools import load_tool
from zppo_mm.corpus.build import build_corpus
from zppo_mm.corpus.recipe import load_recipe
from zppo_mm.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pass_rate": None},
            r"train-0.parquet: no such column, got none for pass_rate \(pass_rate\) of "
            r"mmfinereason, expected one of source: string, .*qwen3vl_4b_pass_rate: double",
        ),
        (
            {"source": "Elsewhere"},
            r"mmfinereason has no rows of some subsets, got none of BMMR, expected each of the "
            r"recipe among Elsewhere",
        ),
    ],
)
def test_names_that_are_not_there(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = mmfinereason_row(1, **change)
    if "pass_rate" in change:
        row["qwen3vl_4b_pass_rate"] = 0.1
        del row["pass_rate"]
    rows = [row, {**row, "source": "FineVision-ai2d_merged"}]
    roots = write_sets(tmp_path, {}, {"data/train-0.parquet": rows})
    (tmp_path / "mmfinereason/data/train-fill.parquet").unlink(missing_ok=True)
    recipe = small_recipe()
    with pytest.raises(DataError, match=message):
        build_corpus(recipe, roots, tmp_path / "out", student_config(tmp_path))
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_inner_column_is_named(tmp_path: Path) -> None:
    row = vero_row(1)
    del row["extra_info"]["reward_type"]
    roots = write_sets(tmp_path, {AI2D_FILE: [row]}, {})
    with pytest.raises(DataError, match=r"got none for answer_kind \(extra_info.reward_type\)"):
        build_corpus(small_recipe(), roots, tmp_path / "out", student_config(tmp_path))


def test_folders_must_be_those_of_the_sets(tmp_path: Path) -> None:
    roots = write_sets(tmp_path, {}, {})
    config = student_config(tmp_path)
    with pytest.raises(DataError, match=r"got folders for vero, expected one for each of vero, mm"):
        build_corpus(small_recipe(), {"vero": roots["vero"]}, tmp_path / "out", config)
    with pytest.raises(DataError, match=r"vero has no files, got nothing at .*train-\*.parquet"):
        build_corpus(small_recipe(), {**roots, "vero": tmp_path}, tmp_path / "out", config)


def test_shards_that_are_there_are_not_lost(tmp_path: Path) -> None:
    _, before = draw(tmp_path, {AI2D_FILE: [vero_row(1)]})
    roots = write_sets(tmp_path, {AI2D_FILE: [vero_row(2)]}, {})
    config, out = student_config(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match="has shards already"):
        build_corpus(small_recipe(), roots, out, config)
    assert json.loads((out / "corpus.json").read_text())["subsets"]
    shards = (out / "shard-000000.tar").read_bytes()
    with pytest.raises(DataError, match=r"no sample is left(.|\n)*small_image"):
        build_corpus(small_recipe(min_image_side=999), roots, out, config, overwrite=True)
    assert (out / "shard-000000.tar").read_bytes() == shards
    assert (out / "corpus.json").exists()
    build_corpus(small_recipe(), roots, out, config, overwrite=True)
    folder = ShardFolder(out)
    after = [folder.question(shard, key) for shard, key in list(folder.keys())]
    assert {each.text for each in before} != {each.text for each in after}


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("cap: 2800", "cap: 0", "tiers: a cap is wrong, got 0"),
        ("- ai2d\n", "- ai2d\n      - ai2d\n", "a subset is in two tiers, got 'ai2d'"),
        ("      - ai2d\n", "", "a set has a subset without a tier, got 'ai2d'"),
        ("MMR1: mmr1", "MMR1: mmk12", "no set has a subset of a tier, got 'mmr1'"),
        ("subset: source", "subset: ''", "mmfinereason has no column for subset"),
        ("pass_rate: pass_rate", "pass_rate: ''", "has max_pass_rate, got no column"),
        ("numeric: rules", "numeric: exact", "unknown kind of grading, got 'exact'"),
        ("name: mmfinereason", "name: vero", "sets have no names of their own"),
        ("files: data/train-*.parquet", "files: ''", "mmfinereason has no files"),
        (
            "answer_kind: extra_info.reward_type",
            "answer_kind: ''",
            "has one of columns.answer_kind and answer_kinds",
        ),
        ("min_image_side: 100", "min_image_sides: 100", r"unknown key, got min_image_sides"),
        (
            "      image: image\n    answer_kinds",
            "      imag: image\n    answer_kinds",
            "unknown key",
        ),
    ],
)
def test_a_recipe_that_cannot_be_right(
    tmp_path: Path, replaced: str, by: str, message: str
) -> None:
    text = RECIPE.read_text(encoding="utf-8")
    assert text.count(replaced) == 1
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(replaced, by), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = write_sets(tmp_path, {AI2D_FILE: [vero_row(1)]}, {})
    config = student_config(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{student: '{config.model.student}'}}\n")
    sets = [f"{name}={folder}" for name, folder in roots.items()]
    # The shipped recipe wants subsets that these small sets do not have.
    tool = load_tool("make_zppo_77k")
    arguments = [str(tmp_path / "out"), "--config", str(run), "--sets", *sets]
    assert tool.main(arguments) == 2
    assert "vero has no rows of some subsets" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(OmegaConf.to_yaml(OmegaConf.structured(small_recipe())))
    assert tool.main([*arguments, "--recipe", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert f"3 samples in {tmp_path / 'out'}" in printed
    assert (tmp_path / "out" / "corpus.txt").read_text() in printed

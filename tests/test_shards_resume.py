"""A run on shards that is killed in the middle of a shard ends as one that was not, bit by bit."""

import pytest
from test_dist import TWO, finished, launch, wait_for
from training import results, run, same_end

from ssl_lab.data.pairs_shapes import ShapesPairs
from ssl_lab.data.shards_write import write_shards

CLIP = [
    "method=clip", "data=shards", "backbone@method.image.backbone=vit_ti4", "method.image.backbone.dim=32",
    "method.image.backbone.depth=1", "method.image.backbone.num_heads=2", "method.image.backbone.patch_size=8",
    "method.text.backbone.dim=32", "method.text.backbone.depth=1", "method.text.backbone.num_heads=2",
    "method.image.embed_dim=16", "method.text.embed_dim=16", "data.tokenizer.vocab_size=320", "data.image_size=16",
    "data.train.context_length=24", "data.train.mix=2", "data.batch_size=8", "duration=12steps", "save_steps=2",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "suite=image_text",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 70), ("test", 20)):
        write_shards(ShapesPairs(split, count, image_size=16), folder, split, 15)
    return f"data.path={folder}"


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run([*CLIP, shards, "data.num_workers=0", f"out={out}"]) == 0
    return out


@pytest.mark.faults("C2", "SIGKILL in the middle of a shard: the same end to the bit")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_in_the_middle_of_a_shard(workers, shards, straight, tmp_path):
    words = [*CLIP, shards, f"data.num_workers={workers}", f"out={tmp_path / 'run'}"]
    assert run(words, fault=("backward", 8)) == -9  # after 56 of 70 rows of the first pass, in the second group
    assert run(words) == 0
    same_end(straight, tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_go_on_in_the_middle_of_a_shard(shards, tmp_path):
    words = [*CLIP, *TWO, shards, "data.num_workers=0", "duration=20steps"]
    finished([*words, f"out={tmp_path / 'whole'}"])
    process = launch([*words, f"out={tmp_path / 'run'}"])
    wait_for(tmp_path / "run/checkpoints/step=6.ckpt")
    process.kill()
    process.communicate(timeout=60)
    finished([*words, f"out={tmp_path / 'run'}"])
    same_end(tmp_path / "whole", tmp_path / "run")


def test_the_suite_of_images_and_texts_is_run_at_the_end(straight):
    found = {(evaluator, name) for _, _, evaluator, name, _ in results(straight)}
    assert {("zero_shot", "top1"), ("cross_retrieval", "image_1"), ("cross_retrieval", "text_10")} <= found
    assert ("linear", "top1") in found and ("zero_shot", "chance/top1") in found


def test_the_suite_judges_it_on_other_data_with_its_own_views_and_words(straight, tmp_path):
    words = ["data=shapes_captions", "data.train.length=40", "data.test.length=30", "data.image_size=16"]
    told = ["data.train.context_length=24", "suite=image_text", "pictures=false", f"out={tmp_path}"]
    assert run(["evaluate", f"ckpt={straight}", *words, *told]) == 0
    assert {(evaluator, name) for _, _, evaluator, name, _ in results(tmp_path)} >= {("zero_shot", "top1")}

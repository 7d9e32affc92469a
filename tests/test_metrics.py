from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrim.errors import DataError, ModelError
from vitrim.metrics.classify import extract, knn_top1, linear_probe_top1, top1
from vitrim.metrics.fidelity import TokenComparison, block_fidelity, compare, fidelity, retrieval_recall, too_few
from vitrim.models.features import features


def small_vit(seed: int, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


@pytest.fixture(scope="module")
def teacher():
    return small_vit(0)


@pytest.fixture(scope="module")
def student(teacher):
    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 3, 16, 16, generator=generator) for size in (5, 1, 4)]


def relative_error(student_ND, teacher_ND) -> float:
    student_ND, teacher_ND = (x.double().reshape(-1, x.shape[-1]).numpy() for x in (student_ND, teacher_ND))
    return float(((student_ND - teacher_ND) ** 2).sum() / ((teacher_ND - teacher_ND.mean(0)) ** 2).sum())


def mean_cosine(student_ND, teacher_ND) -> float:
    pairs = zip(*(x.double().reshape(-1, x.shape[-1]).numpy() for x in (student_ND, teacher_ND)), strict=True)
    return float(np.mean([s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in pairs]))


def features_of_all(model, batches, at="final"):
    with torch.no_grad():
        return features(copy.deepcopy(model).eval(), torch.cat(batches), at=at)


@pytest.mark.parametrize("at", ["final", "pre_norm"])
def test_fidelity_equals_the_formulas_on_all_images_at_once(student, teacher, batches, at):
    found = fidelity(student, teacher, batches, at=at)
    s, t = features_of_all(student, batches, at), features_of_all(teacher, batches, at)
    everything = [torch.cat([x.pooled_BD[:, None], x.patches_BND], 1) for x in (s, t)]
    expected = {
        "relative_error": relative_error(*everything),
        "cosine": mean_cosine(*everything),
        "pooled_relative_error": relative_error(s.pooled_BD, t.pooled_BD),
        "patches_relative_error": relative_error(s.patches_BND, t.patches_BND),
        "pooled_cosine": mean_cosine(s.pooled_BD, t.pooled_BD),
        "patches_cosine": mean_cosine(s.patches_BND, t.patches_BND),
        "num_images": 10,
    }
    agreement = found.pop("top1_agreement")
    assert found == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        scores = [copy.deepcopy(model).eval()(torch.cat(batches)) for model in (student, teacher)]
    assert agreement == (scores[0].argmax(1) == scores[1].argmax(1)).double().mean().item()
    assert 0 < found["relative_error"] < 2


def test_fidelity_of_a_model_with_itself_is_perfect(teacher, batches):
    found = fidelity(teacher, copy.deepcopy(teacher), batches)
    assert found["relative_error"] == 0 and found["top1_agreement"] == 1
    assert found["pooled_cosine"] == pytest.approx(1) and found["patches_cosine"] == pytest.approx(1)


def test_fidelity_takes_tuples_skips_empty_batches_and_restores_modes(student, teacher, batches):
    plain = fidelity(student, teacher, batches)
    student.train()
    empty = (torch.empty(0, 3, 0, 0), torch.empty(0, dtype=torch.int64), 3)
    tuples = [(images, torch.zeros(len(images)), 0) for images in batches]
    assert fidelity(student, teacher, [empty, *tuples, empty]) == plain
    assert student.training
    with pytest.raises(DataError, match="no images"):
        fidelity(student, teacher, [empty])


def test_a_mean_is_no_token_and_other_heads_are_no_agreement(batches):
    options = {"class_token": False, "global_pool": "avg"}
    found = fidelity(small_vit(1, **options, num_classes=0), small_vit(2, **options), batches)
    assert found["relative_error"] == found["patches_relative_error"]
    assert found["pooled_relative_error"] != found["relative_error"]
    assert "top1_agreement" not in found


def test_fidelity_of_models_that_return_one_vector(batches):
    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6))

    found = fidelity(model(0), model(1), batches)
    assert set(found) == {"relative_error", "cosine", "pooled_relative_error", "pooled_cosine", "num_images"}
    assert found["relative_error"] == found["pooled_relative_error"]


def test_fidelity_names_both_shapes_where_they_differ(teacher, batches):
    with pytest.raises(ModelError, match=r"12\).*24\)"):
        fidelity(small_vit(1, embed_dim=12), teacher, batches)


class Scoreless(nn.Module):
    num_classes = 5

    def forward_features(self, images):
        return images.flatten(1)

    def forward(self, images):
        return {"features": images}


def test_fidelity_says_so_where_a_head_gives_no_scores(batches):
    with pytest.raises(ModelError, match="returns no scores"):
        fidelity(Scoreless(), Scoreless(), batches)


def test_relative_error_survives_a_large_offset():
    generator = torch.Generator().manual_seed(0)
    teacher_ND = 1e7 + torch.randn(300, 4, generator=generator, dtype=torch.float64)
    student_ND = teacher_ND + 0.1 * torch.randn(300, 4, generator=generator, dtype=torch.float64)
    stream = TokenComparison()
    for start, stop in ((0, 7), (7, 8), (8, 200), (200, 300)):
        stream.update(student_ND[start:stop], teacher_ND[start:stop])
    assert stream.relative_error == pytest.approx(relative_error(student_ND, teacher_ND), rel=1e-6)
    assert stream.num_tokens == 300


def test_relative_error_of_a_constant_teacher():
    ones = torch.ones(3, 2)
    stream = TokenComparison()
    stream.update(ones, ones)
    assert stream.relative_error == 0
    stream.update(ones + 1, ones)
    assert math.isinf(stream.relative_error)


def test_block_fidelity_equals_hooks_by_hand(student, teacher, batches):
    names = ["blocks.2", "blocks.0", "blocks.1.mlp"]
    found = block_fidelity(student, teacher, batches, names)
    caught: dict = {}
    for which, model in (("student", copy.deepcopy(student)), ("teacher", copy.deepcopy(teacher))):
        for name in names:
            keep = caught.setdefault((which, name), [])
            model.get_submodule(name).register_forward_hook(lambda m, a, out, keep=keep: keep.append(out))
        with torch.no_grad():
            model.eval()(torch.cat(batches))
    assert [row["block"] for row in found] == names
    for row in found:
        pair = caught["student", row["block"]][0], caught["teacher", row["block"]][0]
        assert row["relative_error"] == pytest.approx(relative_error(*pair), rel=1e-5)
        assert row["cosine"] == pytest.approx(mean_cosine(*pair), rel=1e-5)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_block_fidelity_errors_leave_no_hooks(student, teacher, batches):
    with pytest.raises(ModelError, match=r"no block 'blocks\.9'"):
        block_fidelity(student, teacher, batches, ["blocks.0", "blocks.9"])
    with pytest.raises(ModelError, match="head: did not run"):
        block_fidelity(student, teacher, batches, ["head"])
    with pytest.raises(DataError, match="no images"):
        block_fidelity(student, teacher, [], ["blocks.0"])
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def naive_recall(student_BD, teacher_BD, k) -> float:
    s, t = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None] for x in (student_BD, teacher_BD))
    hits = [i in np.argsort(-(t @ s[i]), kind="stable")[:k] for i in range(len(s))]
    return float(np.mean(hits))


def test_retrieval_recall_equals_a_naive_search():
    generator = torch.Generator().manual_seed(0)
    teacher_BD = torch.randn(50, 6, generator=generator)
    student_BD = 3 * teacher_BD + 2 * torch.randn(50, 6, generator=generator)
    found = retrieval_recall(student_BD, teacher_BD, ks=(1, 5, 10), chunk_size=17)
    assert found == pytest.approx({f"recall@{k}": naive_recall(student_BD, teacher_BD, k) for k in (1, 5, 10)})
    assert 0 < found["recall@1"] < found["recall@10"]
    assert retrieval_recall(teacher_BD, teacher_BD) == {"recall@1": 1, "recall@5": 1, "recall@10": 1}


def test_retrieval_with_collapsed_features_is_guessing():
    teacher_BD = torch.ones(20, 3)
    assert retrieval_recall(teacher_BD, teacher_BD, ks=(1, 5)) == pytest.approx({"recall@1": 0.05, "recall@5": 0.25})
    with pytest.raises(DataError, match=r"\(20, 3\) and \(19, 3\)"):
        retrieval_recall(teacher_BD, teacher_BD[1:])


def labelled_blobs(num: int, seed: int, num_classes: int = 4, width: int = 8, noise: float = 1.0):
    centres = 1.2 * torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return centres[labels] + noise * torch.randn(num, width, generator=generator), labels


def naive_knn(train_ND, train_labels, test_ND, test_labels, k, temperature) -> float:
    train = train_ND.double().numpy() / np.linalg.norm(train_ND.double().numpy(), axis=1)[:, None]
    right = 0
    for query, label in zip(test_ND.double().numpy(), test_labels.tolist(), strict=True):
        similar = train @ query / np.linalg.norm(query)
        votes: dict[int, float] = {}
        for i in np.argsort(-similar)[:k]:
            vote = float(np.exp(similar[i] / temperature))
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0) + vote
        right += max(votes, key=lambda c: votes[c]) == label
    return right / len(test_labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (7, 1.0)])
def test_knn_equals_a_naive_loop(k, temperature):
    train, test = labelled_blobs(120, 0, noise=2.0), labelled_blobs(60, 1, noise=2.0)
    found = knn_top1(*train, *test, k=k, temperature=temperature, chunk_size=13)
    assert found == naive_knn(*train, *test, k, temperature)
    assert 0.3 < found < 1


def test_knn_leaves_out_unknown_labels_and_survives_a_tiny_temperature():
    (train_ND, train_labels), (test_ND, test_labels) = labelled_blobs(80, 0), labelled_blobs(40, 1)
    expected = knn_top1(train_ND[:60], train_labels[:60], test_ND[10:], test_labels[10:])
    train_labels[60:], test_labels[:10] = -1, -1
    assert knn_top1(train_ND, train_labels, test_ND, test_labels) == expected
    nearest = knn_top1(train_ND, train_labels, test_ND, test_labels, k=1)
    assert knn_top1(train_ND, train_labels, test_ND, test_labels, k=5, temperature=1e-4) == nearest


def test_knn_errors_say_what_is_allowed():
    train, test = labelled_blobs(10, 0), labelled_blobs(5, 1)
    with pytest.raises(DataError, match=r"use 1\.\.10"):
        knn_top1(*train, *test, k=11)
    with pytest.raises(DataError, match="no image has a label"):
        knn_top1(train[0], torch.full((10,), -1), *test)
    with pytest.raises(DataError, match="10 features and 9 labels"):
        knn_top1(train[0], train[1][:9], *test)


def test_linear_probe_finds_a_linear_rule_that_neighbours_miss():
    generator = torch.Generator().manual_seed(0)
    found_ND = torch.randn(600, 20, generator=generator)
    labels = (found_ND[:, 0] + 0.5 * found_ND[:, 1] > 0).long()
    found_ND[:, 5:] *= 100  # standardised away by the probe, all that the neighbours see
    parts = found_ND[:400], labels[:400], found_ND[400:], labels[400:]
    probe = linear_probe_top1(*parts)
    assert probe > 0.93
    assert knn_top1(*parts) < 0.7
    assert linear_probe_top1(*parts) == probe
    assert linear_probe_top1(*parts, c=1e-1) == pytest.approx(probe, abs=0.03)


def test_linear_probe_ignores_unknown_labels_and_needs_two_classes():
    train, test = labelled_blobs(200, 0), labelled_blobs(100, 1)
    expected = linear_probe_top1(*train, *test)
    more_ND = torch.cat([train[0], torch.randn(30, 8)])
    more_labels = torch.cat([train[1], torch.full((30,), -1)])
    assert linear_probe_top1(more_ND, more_labels, *test) == expected
    with pytest.raises(DataError, match="too few or of one class"):
        linear_probe_top1(train[0], torch.zeros(200, dtype=torch.int64), *test)


def labelled_batches(batches, num_classes=5):
    generator = torch.Generator().manual_seed(3)
    return [(images, torch.randint(num_classes, (len(images),), generator=generator), 0) for images in batches]


def test_top1_counts_right_answers_among_known_labels(teacher, batches):
    with torch.no_grad():
        answers = copy.deepcopy(teacher).eval()(torch.cat(batches)).argmax(1)
    labels = answers.clone()
    labels[:3] = (labels[:3] + 1) % 5
    labels[8:] = -1
    parts = labels.split([len(images) for images in batches])
    teacher.train()
    assert top1(teacher, list(zip(batches, parts, strict=True))) == 5 / 8
    assert teacher.training
    with pytest.raises(DataError, match="no image has a label"):
        top1(teacher, batches)
    with pytest.raises(ModelError, match="no classifier"):
        top1(small_vit(0, num_classes=0), labelled_batches(batches))


def test_extract_returns_pooled_features_and_labels(teacher, batches):
    pairs = labelled_batches(batches)
    pooled_ND, labels_N = extract(teacher, pairs)
    expected = features_of_all(teacher, batches).pooled_BD
    torch.testing.assert_close(pooled_ND, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels_N, torch.cat([labels for _, labels, _ in pairs]))
    assert pooled_ND.dtype == torch.float32 and not pooled_ND.is_inference()
    assert torch.equal(extract(teacher, batches)[1], torch.full((10,), -1))
    with pytest.raises(DataError, match="no images"):
        extract(teacher, [])


@pytest.mark.parametrize("num_images", [49, 50])
def test_recall_and_agreement_are_not_told_of_few_images(build, num_images):
    case = build("timm-vit")
    images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, mine, _ = compare(case.model, case.model, images.split(20))
    told = {name for name in found if name.startswith("recall") or name.endswith("agreement")}
    assert found["num_images"] == len(mine) == num_images
    assert told == (set() if num_images < 50 else {"recall@1", "recall@5", "recall@10", "top1_agreement"})
    assert bool(too_few(num_images)) == (num_images < 50)

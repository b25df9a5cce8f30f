"""A sentencepiece model as one of the tokenizers library, which transformers loads."""

from __future__ import annotations

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

SPACE = "▁"


def of_sentencepiece(proto: bytes) -> Tokenizer:
    """Return the tokenizer that gives the ids of a BPE or unigram model, and its text.

    Text that spells a special piece, such as `</s>`, gets its id only once transformers adds these.
    Raises ValueError for another type of model.
    """
    read = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    trained, rules = read.trainer_spec, read.normalizer_spec
    if trained.model_type == trained.BPE:
        model: models.Model = models.BPE(
            {p.piece: i for i, p in enumerate(read.pieces)},
            _merges({p.piece: -p.score for p in read.pieces if p.type == p.NORMAL}),
            unk_token=read.pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    elif trained.model_type == trained.UNIGRAM:
        scores = [(p.piece, p.score) for p in read.pieces]
        model = models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    else:
        raise ValueError("it is a sentencepiece model of words or characters")
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Return the pairs that BPE joins, first the one whose whole ranks lowest."""
    cuts = [(rank, whole[:i], whole[i:]) for whole, rank in ranks.items() for i in range(1, len(whole))]
    return [(left, right) for _, left, right in sorted(cuts) if left in ranks and right in ranks]

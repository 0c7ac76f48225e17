"""Metrics of generated texts with several references, in the units of the E2E challenge, each from its usual library.

Texts are lower-cased. BLEU's tokeniser (mteval-v13a) splits them into words for all metrics that take words.

* BLEU: sacrebleu, over the corpus.
* NIST: nltk, 5-grams, over the corpus.
* METEOR: the Java program METEOR 1.5, with its synonyms and paraphrases, from pycocoevalcap; left out where there is
  no Java. nltk's own METEOR would lack the synonyms, which are a separate download.
* ROUGE-L: rouge_score, the F-measure with stemming, of the best reference; the mean over texts. (The challenge's script
  weighs recall higher and does not stem.)
* CIDEr: pycocoevalcap, document frequencies from these references.
"""

import atexit
import functools
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence

import sacrebleu
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

TEXT_METRICS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return all metrics of this module by name; BLEU, METEOR and ROUGE-L are in per cent.

    Args:
        texts: one text for each prompt.
        references: the references of each prompt, one or more.
    """
    most = max(len(each) for each in references)
    streams = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
    words = {at: [_words(text)] for at, text in enumerate(texts)}
    wanted = {at: [_words(text) for text in each] for at, each in enumerate(references)}
    found = {
        "BLEU": sacrebleu.corpus_bleu(list(texts), streams, lowercase=True).score,
        "NIST": _nist(words, wanted),
        "ROUGE-L": 100 * rouge_l(texts, references),
        "CIDEr": float(Cider().compute_score(wanted, words)[0]),
    }
    if java() is not None:
        found["METEOR"] = 100 * _meteor().compute_score(wanted, words)[0]
    return found


def java() -> str | None:
    """Return the path of Java, which runs METEOR, or None."""
    return shutil.which("java")


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over texts of the F-measure against the best reference, as a fraction."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, references, strict=True)
    return statistics.mean(scorer.score_multi(list(each), text)["rougeL"].fmeasure for text, each in pairs)


def _nist(texts: Mapping[int, list[str]], references: Mapping[int, list[str]]) -> float:
    wanted = [[text.split() for text in each] for each in references.values()]
    try:
        return float(corpus_nist(wanted, [each[0].split() for each in texts.values()], n=5))
    except ZeroDivisionError:
        # The texts together have no 5-gram.
        return 0.0


@functools.cache
def _meteor() -> Meteor:
    # METEOR takes many seconds to start, so one process serves all runs.
    scorer = Meteor()
    atexit.register(_stop, scorer.meteor_p)
    return scorer


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


@functools.cache
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def _words(text: str) -> str:
    # METEOR reads lines with "|||" between fields: the tokeniser splits such bars, and the join removes line breaks.
    return " ".join(str(_tokenizer()(text.lower())).split())

"""Small copies of published corpora of recordings, laid out as their authors document them, oddities included.

``FIXTURES`` writes each into a folder and returns options that read it without large models. Media are tones and grey
pictures of a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.features.media_files import plain, save_resnet, tone, write_video, write_wave

NO_PICTURE_NO_WORDS = {"visual": {"extractor": "none"}, "text": {"extractor": "none"}}

# ---- IEMOCAP -------------------------------------------------------------------------------------------------

IMPRO = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[0.5000 - 2.5000]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral;\t()
C-E4:\tNeutral;\t()
C-F1:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()
A-E4:\tval 2; act 3; dom  3;\t(mildly aggravated but staying polite, attitude)
A-F1:\tval 3; act 2; dom  1;\t()

[4.0000 - 5.0000]\tSes01F_impro01_F001\txxx\t[3.0000, 3.0000, 3.0000]
C-E2:\tAnger;\t()
C-E3:\tFrustration;\t()
C-E4:\tNeutral;\t()
C-M1:\tOther;\t(resigned)

[2.0000 - 4.0000]\tSes01F_impro01_M000\tfru\t[2.0000, 3.5000, 3.0000]
C-E2:\tFrustration;\t()
C-E3:\tFrustration;\t()
C-E4:\tAnger; Frustration;\t()
"""
"""Two people speak at once from 2.0 to 2.5 s; the second utterance of F stands before that of M."""

IMPRO_WORDS = """\
Ses01F_impro01_F000 [000.5000-002.5000]: Excuse me now, ok.
Ses01F_impro01_M000 [002.0000-004.0000]: [LAUGHTER] Do you have your forms?
M: [BREATHING]
Ses01F_impro01_F001 [004.0000-005.0000]: Yeah.
Ses01F_impro01_MXX0 [005.0000-005.5000]: [GARBAGE]
"""

SCRIPT = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[0.0000 - 1.5000]\tSes0{n}M_script01_1_F000\t{code}\t[2.0000, 3.0000, 3.0000]
C-E2:\tSadness;\t()
C-E4:\tSadness;\t()
C-E5:\tSadness;\t()
"""


def write_iemocap(folder: Path) -> dict[str, Any]:
    dialogues = {"Ses01F_impro01": (1, IMPRO, IMPRO_WORDS)}
    for n, code in enumerate(("sad", "ang", "exc", "fru", "oth"), start=1):
        name = f"Ses0{n}M_script01_1"
        words = f"{name}_F000 [000.0000-001.5000]: So it goes.\n"
        dialogues[name] = (n, SCRIPT.format(n=n, code=code), words)
    for name, (n, evaluation, words) in dialogues.items():
        dialog, sentences = folder / f"Session{n}" / "dialog", folder / f"Session{n}" / "sentences" / "wav" / name
        for part in ("EmoEvaluation/Categorical", "EmoEvaluation/Self-evaluation", "transcriptions", "avi/DivX"):
            (dialog / part).mkdir(parents=True, exist_ok=True)
        sentences.mkdir(parents=True)
        (dialog / "EmoEvaluation" / f"{name}.txt").write_text(evaluation)
        (dialog / "EmoEvaluation" / f"._{name}.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        (dialog / "EmoEvaluation" / "Categorical" / f"{name}_e2_cat.txt").write_text(f"{name}_F000 :Neutral; ()\n")
        (dialog / "transcriptions" / f"{name}.txt").write_text(words)
        for line in evaluation.splitlines():
            if line.startswith("["):
                start, end = (float(time) for time in line[1 : line.index("]")].split(" - "))
                write_wave(sentences / f"{line.split(chr(9))[1]}.wav", tone(end - start))
    write_video(
        folder / "Session1/dialog/avi/DivX/Ses01F_impro01.avi", lambda t: plain(int(30 * t)), 5.5, codec="mpeg4"
    )
    (folder / "Session1/dialog/avi/DivX/._Ses01F_impro01.avi").write_bytes(b"\x00\x05\x16\x07")
    return {"source": str(folder), **NO_PICTURE_NO_WORDS}


# ---- MELD ----------------------------------------------------------------------------------------------------

MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_ROWS = {
    "train": [
        # apostrophes of Windows that were taken for control characters; commas; a quote inside quotes
        '1,"Oh my God, he\x92s lost it.",Phoebe,sadness,negative,0,0,4,7,"00:20:57,256","00:20:58,756"',
        '2,What?,Monica,surprise,negative,0,1,4,7,"00:21:01,927","00:21:02,927"',
        '4,"He said ""No"".",Ross,neutral,neutral,0,3,4,7,"00:21:07,000","00:21:08,5"',
        '5,It\x92s fine.,Ross,joy,positive,2,0,8,21,"00:16:4,380","00:16:05,380"',
    ],
    "dev": ['1,Okay.,Joey,neutral,neutral,0,0,8,21,"00:16:41,126","00:16:42,337"'],
    "test": ['1,Why?,Mark,surprise,positive,0,0,3,19,"00:14:38,127","00:14:39,378"'],
}
MELD_FOLDERS = {
    "train": "train/train_splits",
    "dev": "dev/dev_splits_complete",
    "test": "test/output_repeated_splits_test",
}
MELD_MISSING = "dia0_utt1"
"""One video of the training split is not in the archive."""


def write_meld(folder: Path) -> dict[str, Any]:
    for split, rows in MELD_ROWS.items():
        videos = folder / MELD_FOLDERS[split]
        videos.mkdir(parents=True)
        place = folder / "train" if split == "train" else folder  # the archives unpack so
        text = "\r\n".join([MELD_HEADER, *rows]) + "\r\n"
        (place / f"{split}_sent_emo.csv").write_bytes(text.encode())
        for row in rows:
            dialogue, utterance = row.split(",")[-8:-6] if row.count('"00:') else ("", "")
            name = f"dia{dialogue}_utt{utterance}"
            if (split, name) != ("train", MELD_MISSING):
                write_video(videos / f"{name}.mp4", lambda t: plain(100), 1.0, samples=tone(1.0, rate=48_000))
        (videos / "final_videos_testdia0_utt0.mp4").write_bytes(b"a twin that nothing names")
    return {"source": str(folder), **NO_PICTURE_NO_WORDS}


# ---- DAiSEE --------------------------------------------------------------------------------------------------

DAISEE_CLIPS = {
    # boredom, engagement, confusion, frustration
    "Train": {"1100011002": (0, 2, 0, 0), "1100011003": (3, 2, 0, 0), "1100021001": (2, 3, 2, 0)},
    "Validation": {"4000221001": (0, 1, 3, 2)},
    "Test": {"5000441001": (1, 1, 1, 1), "5000441002": (0, 3, 0, 2)},
}
DAISEE_MISSING = "1100011003"
"""A clip that is listed and not there."""


def write_daisee(folder: Path) -> dict[str, Any]:
    (folder / "Labels").mkdir(parents=True)
    for split, clips in DAISEE_CLIPS.items():
        rows = [f"{clip}.avi,{','.join(map(str, levels))}" for clip, levels in clips.items()]
        header = "ClipID,Boredom,Engagement,Confusion,Frustration "  # the space is theirs
        (folder / "Labels" / f"{split}Labels.csv").write_text("\n".join([header, *rows]) + "\n")
        for clip in clips:
            place = folder / "DataSet" / split / clip[:6] / clip
            place.mkdir(parents=True)
            if clip != DAISEE_MISSING:
                write_video(place / f"{clip}.avi", lambda t: plain(50), 2.0, rate=5, codec="mpeg4")
    (folder / "Labels" / "AllLabels.csv").write_text("ClipID,Boredom,Engagement,Confusion,Frustration \n")
    (folder / "DataSet" / "Train.txt").write_text("1100011002.avi\n")
    weights = save_resnet(folder.with_name(f"{folder.name}-resnet18.safetensors"))
    return {"source": str(folder), "visual": {"depth": 18, "weights": str(weights), "frames_per_second": 1.0}}


def replaced(file: str, old: str, new: str) -> Callable[[Path], object]:
    """Spoils one place of a file of a layout, once."""

    def spoil(folder: Path) -> None:
        content = (folder / file).read_bytes().decode()
        assert old in content
        (folder / file).write_bytes(content.replace(old, new, 1).encode())

    return spoil


FIXTURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "iemocap": write_iemocap,
    "meld": write_meld,
    "daisee": write_daisee,
}

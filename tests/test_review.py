"""The review: what it shows next, what it saves, who may ask, and the page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import aesthetic_filter as af
from aesthetic_filter.calibrate import Target
from aesthetic_filter.errors import OutputError, UsageError
from aesthetic_filter.labels import Label, gather, read_label_rows
from aesthetic_filter.pictures import Pictures
from aesthetic_filter.review.session import Session
from browser import watched
from conftest import Run
from images import EXACT, jpeg, tar_bytes, turned, write_files, write_table, write_tar
from review_server import Server, serving

HOSTILE = {
    "<img src=x onerror=alert(1)>.jpg": 900,
    'quote".jpg': 901,
    "it's.jpg": 902,
    "line\nbreak.jpg": 903,
    "</script><script>alert(2)</script>.jpg".replace("/", "⁄"): 904,
    "up...jpg": 905,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"a/{i:03d}.jpg": jpeg(i, 48) for i in range(150)}
    files |= {name: jpeg(seed, 48) for name, seed in HOSTILE.items()}
    files["phone.jpg"] = turned(5, 64, 32, 6)
    return write_files(tmp_path_factory.mktemp("review") / "photos", files)


@pytest.fixture(scope="module")
def scores(photos: Path, model_dir: Path) -> Path:
    out = photos.parent / "scores"
    af.score(photos, out, model_dir=model_dir, images=EXACT)
    return out


# What comes next, and what is saved. No web.


def session(scores: Path, labels: Path, **options: Any) -> Session:
    return Session(af.open_scores(scores), labels, **options)


def say(score: float) -> str:
    return "keep" if score > 6 else "drop"


def test_everything_said_is_in_the_file_and_is_gone_on_with(scores: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    first = session(scores, path, size=40)
    for _ in range(17):
        (key,) = first.hand_out("ann")
        first.answer("ann", key, say(first.items[key].score))
    assert len(read_label_rows(path)[0]) == 17
    seen = {first.items[key].image_id for key in first._reviewers["ann"].said}
    first.close()
    again = session(scores, path, size=40)
    assert again.status("ann")["judged"] == 17
    shown = []
    while keys := again.hand_out("ann"):
        shown.append(again.items[keys[0]].image_id)
        again.answer("ann", keys[0], "keep")
    assert len(shown) == 23
    assert not seen & set(shown)
    again.close()
    labels = gather(read_label_rows(path)[0])
    assert len(labels) == 40
    assert labels.strata is not None


def test_strata_and_their_sizes_are_saved(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=30)
    for key in here.hand_out("ann", 30):
        here.answer("ann", key, "keep")
    here.close()
    values = np.array(
        [row["aesthetic_score"] for row in af.open_scores(scores).table().to_pylist()]
    )
    for label in read_label_rows(tmp_path / "l.csv")[0]:
        low, high = map(float, label.stratum.split(" to "))
        inside = (values >= np.float32(low)) & (values < np.float32(high))
        assert np.float32(low) <= np.float32(label.score) + 1e-4
        assert label.stratum_rows == np.count_nonzero(inside)


def test_undo_takes_back_the_last_and_shows_it_again(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=20)
    keys = here.hand_out("ann", 3)
    for key in keys:
        here.answer("ann", key, "keep")
    assert here.undo("ann") == keys[2]
    assert here.undo("ann") == keys[1]
    assert here.hand_out("ann", 2) == [keys[1], keys[2]]
    assert here.status("ann")["judged"] == 1
    here.answer("ann", keys[1], "drop")
    assert here.undo("nobody") is None
    here.close()
    found = gather(read_label_rows(tmp_path / "l.csv")[0])
    assert sorted(found.values) == [0, 1]


def test_a_skipped_image_is_replaced_and_counts_for_nothing(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=12)
    said = 0
    while keys := here.hand_out("ann"):
        here.answer("ann", keys[0], "skip" if said % 2 else "keep")
        said += 1
    status = here.status("ann")
    here.close()
    assert (status["judged"], status["skipped"]) == (12, 11)


def test_two_reviewers_share_some_images(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=60)
    for turn in range(70):
        name = ("ann", "ben")[turn % 2]
        for key in here.hand_out(name):
            here.answer(name, key, say(here.items[key].score))
    status = here.status("ann")
    here.close()
    votes = Counter(label.image_id for label in read_label_rows(tmp_path / "l.csv")[0])
    both = sum(count == 2 for count in votes.values())
    assert 6 <= both <= 16  # every fifth
    assert status["agreement"].startswith(f"100% on {both} images")
    assert set(status["reviewers"]) == {"ann", "ben"}


def test_nobody_is_asked_twice_and_the_end_is_the_end(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=1_000)
    shown: list[str] = []
    while keys := here.hand_out("ann", 5):
        for key in keys:
            shown.append(here.items[key].image_id)
            here.answer("ann", key, "keep")
    here.close()
    everything = af.open_scores(scores).table(["image_id"])["image_id"].to_pylist()
    assert sorted(shown) == sorted(everything)


def test_images_of_somebody_who_left_go_to_others(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=10)
    assert len(here.hand_out("ann", 10)) == 10
    for _ in range(10):
        (key,) = here.hand_out("ben")
        here.answer("ben", key, "keep")
    assert here.status("ben")["judged"] == 10
    here.close()


def test_it_goes_where_labels_tell_most(scores: Path, tmp_path: Path) -> None:
    values = np.sort([r["aesthetic_score"] for r in af.open_scores(scores).table().to_pylist()])
    border = float(values[110])  # all from here on are kept, none below
    truth = float(values[-round(np.count_nonzero(values >= border) / 0.8)])
    here = session(scores, tmp_path / "l.csv", size=120, target=Target("precision", 0.8))
    taken = 0
    while keys := here.hand_out("ann"):
        here.answer("ann", keys[0], "keep" if here.items[keys[0]].score >= border else "drop")
        taken += here.items[keys[0]].score >= truth
    found = here.estimate()
    here.close()
    assert found is not None
    assert found.recommendation is not None
    assert found.recommendation.threshold == pytest.approx(truth, abs=0.02)
    above = np.count_nonzero(values >= truth)
    assert taken / above > 120 / len(values)  # where it matters, more than elsewhere


def test_answers_that_make_no_sense(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=5)
    (key,) = here.hand_out("ann")
    for wrong in (-1, 5_000):
        with pytest.raises(UsageError, match="no such image"):
            here.answer("ann", wrong, "keep")
    with pytest.raises(UsageError, match="keep, drop or skip"):
        here.answer("ann", key, "perhaps")
    here.close()
    assert read_label_rows(tmp_path / "l.csv")[0] == []


def test_labels_of_other_scores_are_not_mixed(scores: Path, tmp_path: Path) -> None:
    here = session(scores, tmp_path / "l.csv", size=5)
    here.file.add(Label("x", "keep", "ann", stratum="-3 to 99", stratum_rows=5))
    here.close()
    with pytest.raises(OutputError, match="drawn from other scores"):
        session(scores, tmp_path / "l.csv", size=5)


# The server: who may ask, and for what.


@pytest.fixture(scope="module")
def server(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(scores, tmp_path_factory.mktemp("served"), "--sample", "60") as found:
        yield found


def test_the_address_is_on_this_machine_with_a_token(server: Server) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", server.address)


@pytest.mark.parametrize(
    ("headers", "path", "expected"),
    [
        ({"x-token": ""}, "/api/next", 403),
        ({"x-token": "wrong"}, "/api/next", 403),
        ({"x-token": "ünï"}, "/api/next", 403),
        ({"host": "evil.example"}, "/api/next", 403),
        ({"host": "127.0.0.1.evil.example"}, "/api/next", 403),
        ({"host": "localhost.evil.example:80"}, "/api/next", 403),
        ({"origin": "http://evil.example"}, "/api/next", 403),
        ({"origin": "null"}, "/api/next", 403),
        ({"content-type": "text/plain"}, "/api/next", 403),
        ({"content-type": "application/x-www-form-urlencoded"}, "/api/label", 403),
        ({"x-token": ""}, "/image/0", 403),
        ({"x-token": ""}, "/", 403),
        ({}, "/image/99999", 404),
        ({}, "/image/-1", 404),
        ({}, "/image/..%2f..%2fetc%2fpasswd", 404),
        ({}, "/static/..%2freport.html", 404),
        ({}, "/static/__init__.py", 404),
        ({}, "/docs", 404),
        ({}, "/openapi.json", 404),
    ],
)
def test_who_may_not_ask(server: Server, headers: dict[str, str], path: str, expected: int) -> None:
    body = {"reviewer": "mallory", "count": 1} if path.startswith("/api") else None
    headers = {k: v.encode().decode("latin-1") for k, v in headers.items()}
    status, content, given = server.ask(path, body, headers=headers)
    assert status == expected, content
    assert "default-src 'none'" in given["content-security-policy"]
    assert b"root:" not in content
    if expected == 403:
        assert set(json.loads(content)) == {"error"}


def test_a_tunnel_s_other_port_is_let_in(server: Server) -> None:
    for host in ("localhost:9999", "127.0.0.1:9999", "[::1]:80"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert server.ask("/api/next", {"reviewer": "x"}, headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/label", {"reviewer": "ann", "key": "0", "value": "keep"}),
        ("/api/label", {"reviewer": "ann", "key": True, "value": "keep"}),
        ("/api/label", {"reviewer": "ann", "key": 10**9, "value": "keep"}),
        ("/api/label", {"reviewer": "ann", "value": "keep"}),
        ("/api/label", {"reviewer": "", "key": 0, "value": "keep"}),
        ("/api/next", {"reviewer": "   "}),
        ("/api/next", {"reviewer": "ann", "count": "many"}),
        ("/api/target", {"reviewer": "ann", "measure": "beauty", "value": 0.5}),
        ("/api/target", {"reviewer": "ann", "measure": "precision", "value": 7}),
        ("/api/target", {"reviewer": "ann", "measure": "precision"}),
        ("/api/next", [1, 2]),
    ],
)
def test_requests_that_make_no_sense(server: Server, path: str, body: Any) -> None:
    status, content, _ = server.ask(path, body)
    assert status in (400, 422), content
    assert b"Traceback" not in content


def test_images_are_jpegs_made_anew_and_upright(server: Server, photos: Path) -> None:
    found = server.post("/api/next", reviewer="looker", count=48)["items"]
    assert len(found) >= 40
    for item in found[:10]:
        status, content, headers = server.ask(f"/image/{item['key']}")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        with Image.open(BytesIO(content)) as image:
            assert image.size == (48, 48) or item["id"] == "phone.jpg"
        original = photos / item["id"].encode().decode("unicode_escape", "ignore")
        if original.exists():
            assert content != original.read_bytes()


def test_what_is_said_is_in_the_file_when_the_answer_comes(server: Server) -> None:
    item = server.post("/api/next", count=1)["items"][0]
    server.post("/api/label", key=item["key"], value="drop")
    last = read_label_rows(server.labels)[0][-1]
    assert (last.value, last.reviewer) == ("drop", "ann")
    undone = server.post("/api/undo")
    assert undone["item"]["key"] == item["key"]
    assert read_label_rows(server.labels)[0][-1].value == ""


def test_a_killed_review_keeps_every_label_and_goes_on(scores: Path, tmp_path: Path) -> None:
    with serving(scores, tmp_path, "--sample", "30") as first:
        for _ in range(7):
            item = first.post("/api/next", count=1)["items"][0]
            first.post("/api/label", key=item["key"], value="keep")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(10)
    with serving(scores, tmp_path, "--sample", "30") as second:
        assert second.post("/api/next", count=1)["status"]["judged"] == 7
        second.process.send_signal(signal.SIGINT)
        out, err = second.process.communicate(timeout=20)
    assert second.process.returncode == 0, err
    assert out.splitlines() == [
        f"{second.labels}: 7 images judged",
        f"next: aesthetic-filter calibrate {second.labels} --scores {scores} "
        "--target-precision 0.9",
    ]
    assert "Traceback" not in err


def test_two_at_once(scores: Path, tmp_path: Path) -> None:
    """Many answers from several threads: each is saved once, whole."""
    with serving(scores, tmp_path, "--sample", "120") as server:

        def work(name: str) -> None:
            for _ in range(15):
                item = server.post("/api/next", reviewer=name, count=1)["items"][0]
                server.post("/api/label", reviewer=name, key=item["key"], value="keep")

        threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read_label_rows(tmp_path / "labels.csv")[0]
    assert len(found) == 60
    assert Counter(label.reviewer for label in found) == {f"r{i}": 15 for i in range(4)}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_in_tars_and_parquet(kind: str, tmp_path: Path, model_dir: Path) -> None:
    images = {f"{i:02d}": jpeg(i, 40 + i) for i in range(24)}
    if kind == "tar":
        write_tar(tmp_path / "in/0.tar", [(f"{k}.jpg", v) for k, v in list(images.items())[:12]])
        write_tar(tmp_path / "in/1.tar", [(f"{k}.jpg", v) for k, v in list(images.items())[12:]])
    else:
        (tmp_path / "in").mkdir()
        write_table(tmp_path / "in/0.parquet", {"id": list(images), "image": list(images.values())})
    af.score(tmp_path / "in", tmp_path / "scores", model_dir=model_dir, images=EXACT)
    before = sorted(p.name for p in (tmp_path / "in").iterdir())
    with serving(tmp_path / "scores", tmp_path, "--sample", "24") as server:
        items = server.post("/api/next", count=24)["items"]
        assert len(items) == 24
        for item in items:
            status, content, _ = server.ask(f"/image/{item['key']}")
            assert status == 200
            side = 40 + int(item["id"].rpartition("/")[2])
            with Image.open(BytesIO(content)) as image:
                assert image.size == (side, side)
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == before


def test_remote_sources(model_dir: Path, tmp_path: Path) -> None:
    """Tars and single files on a file system that is not this machine's."""
    memory = fsspec.filesystem("memory")
    images = {f"{i:02d}": jpeg(i, 40 + i) for i in range(16)}
    memory.pipe("/bucket/tars/0.tar", tar_bytes([(f"{k}.jpg", v) for k, v in images.items()]))
    for key, data in images.items():
        memory.pipe(f"/bucket/files/{key}.jpg", data)
    try:
        for kind in ("tars", "files"):
            out = tmp_path / kind
            af.score(f"memory://bucket/{kind}", out, model_dir=model_dir, images=EXACT)
            opened = af.open_scores(out)
            here = Session(opened, tmp_path / f"{kind}.csv", size=16)
            rows = [here.items[key] for key in here.hand_out("ann", 16)]
            here.close()
            found = {place.image_id: picture for place, picture in Pictures(opened).fetch(rows)}
            assert {k.rpartition("/")[2].removesuffix(".jpg") for k in found} == set(images)
            for name, picture in found.items():
                key = name.rpartition("/")[2].removesuffix(".jpg")
                assert picture.data == images[key], picture.problem
    finally:
        memory.rm("/bucket", recursive=True)


def test_fifty_thousand_images(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(5, 0.7, 50_000).astype(np.float32)
    table = {
        "image_id": [f"{i % 10}/{i:06d}.jpg" for i in range(50_000)],
        "aesthetic_score": pa.array(values),
        "error": pa.nulls(50_000, pa.string()),
    }
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    here = session(tmp_path / "scores.parquet", tmp_path / "l.csv", size=300)
    chance = np.random.default_rng(1)
    for _ in range(300):
        (key,) = here.hand_out("ann")
        likely = 1 / (1 + np.exp(-4 * (here.items[key].score - 5.5)))
        here.answer("ann", key, "keep" if chance.random() < likely else "drop")
    assert here.hand_out("ann") == []
    found = here.estimate()
    here.close()
    assert found is not None
    assert found.recommendation is not None
    assert found.curve.population.rows == 50_000
    assert found.curve.judged.weights.sum() == pytest.approx(50_000)
    chances = 1 / (1 + np.exp(-4 * (values.astype(float) - 5.5)))
    low, high = found.recommendation.low, found.recommendation.high
    grid = found.curve.population.thresholds
    truth = next(t for t in grid if chances[values >= np.float32(t)].mean() >= 0.9)
    assert low <= truth <= high


def test_a_source_that_vanishes_half_way(scores: Path, photos: Path, tmp_path: Path) -> None:
    copy, moved = tmp_path / "photos", tmp_path / "moved"
    shutil.copytree(photos, copy)
    with serving(scores, tmp_path, "--sample", "150", "--source", str(copy)) as server:
        first = server.post("/api/next", count=1)["items"][0]
        assert server.ask(f"/image/{first['key']}")[0] == 200
        copy.rename(moved)
        gone = 0
        for item in server.post("/api/next", count=48)["items"]:
            status, content, _ = server.ask(f"/image/{item['key']}")
            assert status in (200, 410)
            gone += status == 410
            if status == 410:
                assert json.loads(content)["error"]
                last = item
        assert gone > 20
        server.post("/api/label", key=first["key"], value="keep")  # what was seen can be judged
        moved.rename(copy)
        assert server.ask(f"/image/{last['key']}")[0] == 200  # and it may come back


def test_mistakes_are_explained(
    scores: Path, tmp_path: Path, cli: Run, make_embeddings: Any
) -> None:
    np.save(tmp_path / "e.npy", make_embeddings(50))
    af.score(tmp_path / "e.npy", tmp_path / "vectors")
    ran = cli("review", "vectors", "--no-open", "--port", "0")
    assert ran.returncode == 2
    assert "made from embeddings" in ran.stderr
    assert not (tmp_path / "labels.csv").exists()
    ran = cli("review", scores, "--no-open", "--target-kept", "0.1", "--target-recall", "0.9")
    assert ran.returncode == 2
    assert "give one target" in ran.stderr
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    ran = cli("review", scores, "--no-open", "--labels", "other.csv")
    assert ran.returncode == 2
    assert "holds something else" in ran.stderr
    with serving(scores, tmp_path) as server:
        port = server.root.rpartition(":")[2]
        ran = cli("review", scores, "--no-open", "--port", port, "--labels", "second.csv")
        assert ran.returncode == 2
        assert f"port {port} cannot be had" in ran.stderr
        ran = cli("review", scores, "--no-open", "--port", 0, "--labels", server.labels)
        assert ran.returncode == 2
        assert "another review is writing to it" in ran.stderr


# In a browser.


def answers(labels: Path) -> list[str]:
    return [str(label.value) for label in read_label_rows(labels)[0]]


SEEN = """(() => {
    const image = document.querySelector("#frame img");
    return image && image.complete && image.naturalWidth > 0;
})()"""


def press(page: Any, key: str) -> None:
    """Press a key once the image is there to be judged."""
    page.locator("#frame img").wait_for()
    before = page.locator("#frame").get_attribute("data-key")
    page.wait_for_timeout(30)
    for _ in range(100):
        if page.evaluate(SEEN):
            break
        page.wait_for_timeout(20)
    page.keyboard.press(key)
    for _ in range(100):
        if page.locator("#frame").get_attribute("data-key") != before:
            break
        page.wait_for_timeout(20)


def wait_for_labels(labels: Path, count: int) -> list[str]:
    for _ in range(200):
        found = answers(labels)
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{len(found)} labels, not {count}")


def test_keyboard_undo_reload_and_continue(browser: Any, scores: Path, tmp_path: Path) -> None:
    alerts: list[str] = []
    with (
        serving(scores, tmp_path, "--sample", "60") as server,
        watched(browser, server.address, wait="#frame img") as seen,
    ):
        page = seen.page
        page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        for key in ("k", "d", "s", "ArrowRight", "ArrowLeft"):
            press(page, key)
        said = wait_for_labels(server.labels, 5)
        assert said == ["keep", "drop", "skip", "keep", "drop"]
        shown = page.locator("#frame").get_attribute("data-key")
        page.keyboard.press("u")
        assert wait_for_labels(server.labels, 6)[-1] == ""
        page.locator(f"#frame:not([data-key='{shown}']) img").wait_for()
        press(page, "k")
        wait_for_labels(server.labels, 7)
        page.locator("#done", has_text="4 of 60 images judged, 1 skipped").wait_for()
        next_one = page.locator("#frame").get_attribute("data-key")
        page.reload()
        page.locator("#frame img").wait_for()
        assert page.locator("#frame").get_attribute("data-key") == next_one
        page.locator("#done", has_text="4 of 60 images judged").wait_for()
        page.locator("[data-say=keep]").click()
        wait_for_labels(server.labels, 8)
        for turn in range(14):
            press(page, "kd"[turn % 2])
        wait_for_labels(server.labels, 22)
        page.locator("#interval", has_text="%").or_(
            page.locator("#interval", has_text="No threshold")
        ).wait_for()
        assert seen.complaints == []
        assert seen.outside(server.root) == []
        assert server.token not in "".join(map(str, answers(server.labels)))
    assert alerts == []
    assert {label.reviewer for label in read_label_rows(server.labels)[0]} == {"ann"}


def test_the_grid_by_click_and_key(browser: Any, scores: Path, tmp_path: Path) -> None:
    with (
        serving(scores, tmp_path, "--sample", "60") as server,
        watched(browser, server.address, wait="#frame img") as seen,
    ):
        page = seen.page
        page.keyboard.press("g")
        page.locator("#many figure img").nth(11).wait_for()
        page.keyboard.press("k")
        page.keyboard.press("d")
        assert wait_for_labels(server.labels, 2) == ["keep", "drop"]
        page.locator("#many figure").nth(5).get_by_role("button", name="Drop").click()
        assert wait_for_labels(server.labels, 3)[-1] == "drop"
        assert "said-drop" in (page.locator("#many figure").nth(5).get_attribute("class") or "")
        page.keyboard.press("u")
        assert wait_for_labels(server.labels, 4)[-1] == ""
        page.keyboard.press("i")
        assert page.locator("#reveal").get_attribute("aria-pressed") == "true"
        assert seen.complaints == []


def test_hostile_names_are_only_text(browser: Any, scores: Path, tmp_path: Path) -> None:
    alerts: list[str] = []
    shown: set[str] = set()
    with (
        serving(scores, tmp_path, "--sample", "157") as server,
        watched(browser, server.address, wait="#frame img") as seen,
    ):
        seen.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        everything = {
            item["id"]: item["key"]
            for item in server.post("/api/next", reviewer="all", count=48)["items"]
        }
        while any(name.replace("\n", "\\n") not in everything for name in HOSTILE):
            for key in list(everything.values()):
                server.ask("/api/label", {"reviewer": "all", "key": key, "value": "skip"})
            more = server.post("/api/next", reviewer="all", count=48)["items"]
            if not more:
                break
            everything |= {item["id"]: item["key"] for item in more}
        assert {name.replace("\n", "\\n") for name in HOSTILE} <= set(everything)
        seen.page.keyboard.press("i")
        for _ in range(12):
            shown.add(seen.page.locator("#caption").inner_text())
            press(seen.page, "s")
        assert seen.page.locator("#caption img").count() == 0
        assert seen.complaints == []
    assert alerts == []
    assert shown


@pytest.mark.parametrize("size", ["wide", "tablet", "phone"])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen(browser: Any, server: Server, size: str, dark: bool) -> None:
    with watched(browser, server.address, size=size, dark=dark, wait="#frame img") as seen:
        assert seen.fits()
        background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(23, 22, 20)") is dark
        assert all(seen.page.locator("img").evaluate_all("all => all.map(i => !!i.alt)"))
        assert seen.complaints == []


def test_a_server_that_is_gone_is_said_so(browser: Any, scores: Path, tmp_path: Path) -> None:
    with (
        serving(scores, tmp_path, "--sample", "60") as server,
        watched(browser, server.address, wait="#frame img") as seen,
    ):
        server.process.kill()
        server.process.wait(10)
        seen.page.locator("[data-say=keep]").click()
        seen.page.locator("#problem", has_text="has stopped running").wait_for()
        assert answers(server.labels) == []


def test_it_needs_its_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from aesthetic_filter.errors import MissingExtraError\n"
        "try:\n    import aesthetic_filter.review.app\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ},
    )
    assert 'pip install "aesthetic-filter[web]"' in ran.stdout

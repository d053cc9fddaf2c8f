"""The server of runs that go on: what is new is on the page, nothing is read twice, and nobody else is answered."""

import contextlib
import http.client
import json
import os
import socket
import threading

import pytest

from sigmarep.diagnostics import files, follow, show, watch
from sigmarep.errors import BadInput
from tests.diagnostics.test_page import HOSTILE
from tests.diagnostics.written import collapsing, row, run_folder, sweep


def add(folder, *rows):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def text(follower):
    return follower.body.main


def panels(follower, since=0):
    return json.loads(follower.data(since))["panels"]


@contextlib.contextmanager
def serving(*folders, most=4):
    server = watch.Server(follow.Follower([str(each) for each in folders], most=most), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    top = tmp_path_factory.mktemp("served")
    (top / "secret.txt").write_text("the secret")
    run_folder(top / "runs/<img src=x onerror=alert(1)>", collapsing())
    run_folder(top / "runs/a", [row(1, 1.0, 2.0)], config={HOSTILE[0]: HOSTILE[1]})
    with serving(top / "runs") as made:
        yield made


def ask(server, path=None, method="GET", host=None, **headers):
    """Status, text and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path or f"/{server.token}/", skip_host=True, skip_accept_encoding=True)
    if host is not False:
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def test_the_page_is_answered_with_its_policy(server):
    status, page, headers = ask(server)
    assert status == 200
    assert "2 runs: 2 unfinished." in page
    assert "default-src 'none'" in page
    assert "connect-src 'self'" in page
    assert "unsafe" not in page.split("</head>")[0]
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    version = json.loads(page.split('id="data">')[1].split("</script>")[0])["version"]
    status, content, _ = ask(server, f"/{server.token}/?since={version}")
    assert (status, content) == (204, "")
    assert ask(server, method="HEAD")[:2] == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", "", "0.0.0.0", False]
)
def test_another_host_is_refused(server, host):
    host = host if host else ("" if host == "" else False)
    status, content, _ = ask(server, host=host if host != "" else " ")
    assert (status, content) == (403, "403 another host\n")


def test_names_of_this_machine_are_answered_at_any_port(server):
    for host in ("localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8000"):
        assert ask(server, host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "script"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
    ],
)
def test_another_origin_is_refused(server, headers):
    assert ask(server, **headers)[0] == 403


def test_the_pages_own_requests_are_answered(server):
    own = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, Origin=own, Sec_Fetch_Site="same-origin")[0] == 200


PATHS = [
    "/",
    "/wrong/",
    "/{token}",
    "/{token}x/",
    "/{token}/secret.txt",
    "/{token}/../secret.txt",
    "/{token}/..%2fsecret.txt",
]
PATHS += [
    "/{token}/%2e%2e/secret.txt",
    "/{token}/../../../../etc/passwd",
    "//etc/passwd",
    "/{token}/%00",
    "/{token}/./",
]
PATHS += ["/%7Btoken%7D/", "http://evil.example/{token}/", "/etc/passwd", "/{token}/metrics.jsonl", "/{token}//"]


@pytest.mark.parametrize("path", PATHS)
def test_no_other_path_is_known(server, path):
    status, content, _ = ask(server, path.replace("{token}", server.token))
    assert (status, content) == (404, "404 no such address\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_nothing_is_taken(server, method):
    assert ask(server, method=method, Content_Length="0")[0] == 405


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(200)) + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"\x00\xff\x16\x03 \r\n\r\n", b"400"),
        (b"MAKE / HTTP/1.1\r\n\r\n", b"501"),
    ],
)
def test_requests_that_are_none(server, request_bytes, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(request_bytes)
        answer = connection.recv(4096)
    assert status in answer.split(b"\n")[0]
    assert ask(server)[0] == 200


def test_a_port_that_is_taken(server):
    with pytest.raises(BadInput, match=f"--port {server.server_port}: cannot be used"):
        watch.Server(server._follower, server.server_port)


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    rows = collapsing()
    folder = run_folder(tmp_path / "a", rows[:50], total=500)
    lines = []
    add_line = files.MetricsFile._add
    monkeypatch.setattr(files.MetricsFile, "_add", lambda file, line: lines.append(line) or add_line(file, line))
    follower = follow.Follower([str(folder)], most=4)
    assert follower.update()
    # Once to judge the run, once more for what only a drawn run needs.
    assert len(lines) == 100
    assert not follower.update()
    assert "at step 250 of 500" in text(follower)
    lines.clear()
    add(folder, *rows[50:53])
    assert follower.update()
    assert len(lines) == 3
    assert "at step 265 of 500" in text(follower)
    assert max(panels(follower)[0]["steps"][0]) == 265
    # Half a line waits for its other half.
    lines.clear()
    half, other = json.dumps(rows[53])[:20], json.dumps(rows[53])[20:] + "\n"
    for part, step in ((half, 265), (other, 270)):
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(part)
        follower.update()
        assert f"at step {step} of 500" in text(follower)
    assert len(lines) == 1


def test_the_page_is_that_of_the_report(tmp_path):
    from sigmarep.diagnostics import page, report

    folder = sweep(tmp_path)
    follower = follow.Follower([str(folder)], most=2)
    follower.update()
    made = page.body(report._read([str(folder)], most=2, jobs=1, static=None, width=1.0)[2])
    assert [figure.data for figure in follower.body.figures] == [figure.data for figure in made.figures]
    assert text(follower).split("\n")[3:] == made.main.split("\n")[3:]


@pytest.mark.parametrize("how", ["truncated", "replaced", "rewritten"])
def test_a_file_that_is_another_is_read_anew(tmp_path, how):
    folder = run_folder(tmp_path / "a", [row(step, 1.0, 2.0) for step in range(1, 40)], total=500)
    follower = follow.Follower([str(folder)], most=4)
    follower.update()
    path = folder / "metrics.jsonl"
    count = {"truncated": 5, "replaced": 60, "rewritten": 60}[how]
    content = "".join(json.dumps(row(step, 3.0, 1.0)) + "\n" for step in range(1, count + 1))
    if how == "replaced":
        (folder / "new").write_text(content)
        os.replace(folder / "new", path)
    else:
        path.write_text(content)
    assert follower.update()
    loss = panels(follower)[0]
    assert loss["steps"][0] == list(range(1, count + 1))
    assert "highest 3 (training loss" in follower.body.figures[0].words
    path.unlink()
    assert follower.update()
    assert "Nothing is logged yet" in text(follower)


def test_unchanged_plots_are_not_sent_again(tmp_path):
    run_folder(tmp_path / "runs/a", collapsing(), total=500)
    run_folder(tmp_path / "runs/b", collapsing()[:50], total=500)
    follower = follow.Follower([str(tmp_path / "runs")], most=4)
    follower.update()
    version = follower.version
    assert all("same" not in each for each in panels(follower))
    add(tmp_path / "runs/b", *collapsing()[50:51])
    follower.update()
    sent = [each["group"] for each in panels(follower, version) if "same" not in each]
    assert sent
    assert not any(group.endswith("/a") for group in sent)
    assert any("same" in each for each in panels(follower, version))


def test_runs_come_and_go_and_the_folder_may_be_empty(tmp_path):
    (tmp_path / "runs").mkdir()
    follower = follow.Follower([str(tmp_path / "runs")], most=1)
    follower.update()
    assert "No run is here yet" in text(follower)
    for name in ("a", "b", "c"):
        run_folder(tmp_path / "runs" / name, [row(1, 1.0, 2.0)], total=500)
    assert follower.update()
    assert "3 runs: 3 unfinished." in text(follower)
    # A run that is drawn no longer lets go of what only its plots need.
    held = {folder: each.metrics.rows.names for folder, each in follower._runs.items()}
    add(tmp_path / "runs/c", row(2, 0.1, 2.0))
    follower.update()
    assert sum("attention/entropy_head/encoder/block_0/0" in names for names in held.values()) == 1
    for name in ("metrics.jsonl", "config.json", "environment.json"):
        (tmp_path / "runs/b" / name).unlink()
    assert follower.update()
    assert "2 runs: 2 unfinished." in text(follower)


def test_links_out_of_the_folder_are_not_read(tmp_path):
    outside = run_folder(tmp_path / "outside", [row(1, 7.5, 2.0)], total=500)
    (tmp_path / "secret").write_text("a password")
    runs = tmp_path / "runs"
    run_folder(runs / "good", [row(1, 1.0, 2.0)], total=500)
    (runs / "linked").symlink_to(outside)
    run_folder(runs / "log", [row(1, 1.0, 2.0)], total=500)
    (runs / "log/log.txt").symlink_to(tmp_path / "secret")
    run_folder(runs / "inner", [row(1, 1.0, 2.0)], total=500)
    (runs / "inner/log.txt").symlink_to(runs / "good/metrics.jsonl")
    (runs / "sweep.json").write_text(json.dumps({"log": {"state": "failed", "point": {}}}))
    follower = follow.Follower([str(runs)], most=4)
    follower.update()
    assert "7.5" not in text(follower)
    assert "password" not in text(follower)
    assert "1 runs are links out of the folder" in text(follower)
    assert "log: log.txt leads out of the folder; this run is not read." in text(follower)
    assert "2 runs: 2 unfinished." in text(follower)
    # A link that is made later is seen before anything is read through it.
    (runs / "good/metrics.jsonl").unlink()
    (runs / "good/metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    follower.update()
    assert "7.5" not in text(follower)
    (runs / "sweep.json").unlink()
    (runs / "sweep.json").symlink_to(tmp_path / "secret")
    follower.update()
    assert "sweep.json leads out of the folder, which is not read." in text(follower)


def test_a_folder_that_may_only_be_read_is_left_as_it_is(tmp_path):
    folder = run_folder(tmp_path / "a", collapsing(), total=500)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        with serving(folder) as server:
            assert ask(server)[0] == 200
    finally:
        folder.chmod(0o755)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="there is no such folder"):
        follow.Follower([str(tmp_path / "nowhere")], most=4)
    with pytest.raises(BadInput, match="no folder was given"):
        follow.Follower([], most=4)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(tmp_path):
    shown = show(str(run_folder(tmp_path / "<b>", collapsing(), total=500)))._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert shown.count("<") == 2
    assert "fell below 0.1 nats at step 340" in shown

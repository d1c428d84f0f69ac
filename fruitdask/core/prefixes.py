"""Listing of S3, several folders at once: a page of a listing takes longer to arrive than to read."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import Any

#: A listed file: path, bytes, and a text that changes when the file does.
Row = tuple[str, int, str]
#: Folders that are listed at once, and pages of each that are held until the folders before it are complete: these are
#: at most 512,000 files, which take 130 MB.
_N_AT_ONCE, _MAX_HELD = 8, 64
#: Levels of folders that are searched until there are that many folders.
_MAX_DEPTH = 3

#: Asks for a page of a folder: its rows, and the token of the next one.
_Ask = Callable[..., Future[tuple[list[Row], str | None]]]


def list_below(fs: Any, top: str) -> Iterator[Row]:
    """List the files below a folder in the order of their names."""
    rows, token = fs.list_page(top)
    if token is None:
        yield from rows
        return
    places = _find_places(fs, top)
    # Not all servers report all folders.
    if not all(_is_below(path, places) for path, _, _ in rows):
        places = [""]
    with ThreadPoolExecutor(_N_AT_ONCE) as pool:
        yield from _list_places(places, partial(pool.submit, fs.list_page, top))


def _is_below(path: str, places: list[Row | str]) -> bool:
    """Whether a file is one of sorted places, or in one of them."""
    place = places[bisect_right(places, path, key=get_name) - 1]
    return path.startswith(place) if isinstance(place, str) else path == place[0]


def get_name(place: Row | str) -> str:
    """Return the name of a file or folder."""
    return place if isinstance(place, str) else place[0]


def _find_places(fs: Any, top: str) -> list[Row | str]:
    """Find files and names of folders that together hold all files, in the order of their names.

    If there are fewer folders than can be listed at once, such as train and test, this finds those inside them.
    """
    places: list[Row | str] = [""]
    for _ in range(_MAX_DEPTH):
        if sum(isinstance(place, str) for place in places) >= _N_AT_ONCE:
            break
        before = places
        levels = [isinstance(place, str) and fs.list_level(top, place) for place in before]
        places = [each for place, level in zip(before, levels, strict=True) for each in level or [place]]
        if places == before:
            break
    return places


def _list_places(places: list[Row | str], ask: _Ask) -> Iterator[Row]:
    """List files and the contents of folders in this order, and ask for pages of the next folders meanwhile."""
    coming = (_Pages(place, ask) for place in places)
    ahead = deque(islice(coming, _N_AT_ONCE))
    while ahead:
        for pages in ahead:
            pages.advance()
        if ahead[0].held:
            yield from ahead[0].held.popleft()
        elif ahead[0].request:
            wait([pages.request for pages in ahead if pages.request], return_when=FIRST_COMPLETED)
        else:
            ahead.popleft()
            ahead.extend(islice(coming, 1))


class _Pages:
    """Pages of one folder that have arrived, and the request for the next one; a file counts as a page."""

    def __init__(self, place: Row | str, ask: _Ask) -> None:
        self.held = deque([] if isinstance(place, str) else [[place]])
        self._ask = partial(ask, folder=place)
        self.request = self._ask() if isinstance(place, str) else None
        self._token: str | None = None

    def advance(self) -> None:
        """Take the page that has arrived, and ask for the next one."""
        if self.request and self.request.done():
            rows, self._token = self.request.result()
            self.held.append(rows)
            self.request = None
        if self._token and not self.request and len(self.held) < _MAX_HELD:
            self.request = self._ask(self._token)

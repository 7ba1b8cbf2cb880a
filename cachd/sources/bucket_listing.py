"""Lists the objects below a prefix of a bucket, also where a server knows only a part of ListObjectsV2.

IsTruncated, NextContinuationToken     ListObjectsV2, page by page
IsTruncated without a (new) token      ListObjects, each page after the last key of the one before: older
Ceph, Swift and OBS answer so, and mocks
a page without IsTruncated             truncated if it has a token, or as many keys as a page may have
CommonPrefixes, though no delimiter was sent     the server lists one folder at a time: Alluxio does
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cachd.errors import Invalid, Unavailable
from cachd.foreign import too_large
from cachd.model import MAX_FILES, Entries, check_path
from cachd.model.folders import check_folders, folder_markers
from cachd.model.leftovers import is_left_out, unfinished
from cachd.sources.aws_errors import bucket_errors
from cachd.sources.buckets import Buckets
from cachd.sources.cancel import CancelToken
from cachd.sources.objects import Listed

_MAX_PAGES = 1000
_MAX_FOLDERS = 1000  # that a server lists one by one
_LONGEST_KEY = 1024  # of an object of S3
_PAGE_KEYS = 1000  # the most keys of a page, where it does not say so itself
_OF_A_PAGE = ("Name", "Prefix", "IsTruncated", "MaxKeys", "KeyCount", "Contents")


class BucketListing:
    """Lists the buckets of one service."""

    def __init__(self, buckets: Buckets, max_files: int = MAX_FILES) -> None:
        self._buckets, self._max_files = buckets, max_files

    def read(self, bucket: str, prefix: str, cancel_token: CancelToken) -> dict[str, Listed]:
        """Every object below a prefix that is a file, by its path there.

        What a download or a copy has not ended is among them, see `leftovers.unfinished`.
        """
        folder = prefix if prefix.endswith("/") or not prefix else prefix + "/"
        shown = f"s3://{bucket}/{folder}"
        found: dict[str, Listed] = {}
        entries = Entries(shown, self._max_files)
        for each in self._everything(bucket, folder, shown, cancel_token):
            path = each.key.removeprefix(folder)
            if not each.key.startswith(folder) or not path.strip("/"):
                continue
            if is_left_out(path) and not unfinished(path):
                continue
            if path in found:
                raise Invalid(f"{shown} lists {path!r} twice", code="bad_manifest")
            entries.add(each.key, each.etag)
            found[path] = each
        sizes = {path: each.least_size for path, each in found.items()}
        files = found.keys() - folder_markers(sizes)
        check_folders(shown, {path: sizes[path] for path in files})
        return {check_path(path): found[path] for path in files}

    def _everything(
        self, bucket: str, folder: str, shown: str, cancel_token: CancelToken
    ) -> Iterator[Listed]:
        """Every object below a folder, also those of folders that are listed in place of their objects."""
        waiting, known, asked = [folder], {folder}, 0
        while waiting:
            folders = set[str]()
            for at in waiting:
                for each in self._pages(bucket, at, folders, shown, cancel_token):
                    yield each
                    above = each.key.rstrip("/")
                    while (above := above.rpartition("/")[0]) and f"{above}/" not in known:
                        known.add(f"{above}/")
            waiting = sorted(each for each in folders - known if each.startswith(folder))
            known.update(waiting)
            asked += len(waiting)
            if asked > _MAX_FOLDERS or any(len(each) > _LONGEST_KEY for each in waiting):
                raise too_large(f"the listing of {shown}", _MAX_FOLDERS, unit="folders")

    def _pages(
        self, bucket: str, folder: str, folders: set[str], shown: str, cancel_token: CancelToken
    ) -> Iterator[Listed]:
        """Every object that the listing of a prefix names. Adds to `folders` those that it names, too."""
        query: dict[str, str] = {"Bucket": bucket, "Prefix": folder, **self._buckets.payer}
        operation, before = "list_objects_v2", list[Listed]()
        for _ in range(_MAX_PAGES):
            with bucket_errors(shown):
                page = self._page(operation, query, cancel_token)
                entries = list(map(Listed.of, page.get("Contents", ())))
                cancel_token.count(len(entries))
                named = [str(each["Prefix"]) for each in page.get("CommonPrefixes", ())]
                cancel_token.count(len(named))
                folders.update(named[: _MAX_FOLDERS + 1])
            is_new = entries != before or not entries
            yield from entries if is_new else ()
            if not _is_truncated(page, len(entries)):
                return
            before, token = entries, page.get("NextContinuationToken")
            if "Marker" not in query and is_new and token and token != query.get("ContinuationToken"):
                query["ContinuationToken"] = token
                continue
            after = page.get("NextMarker") or (entries[-1].key if entries else "")
            if after <= query.get("Marker", ""):
                raise Unavailable(
                    f"{shown}: the listing says that more follows {after!r:.200}, but repeats its entries",
                    code="origin_protocol",
                )
            operation = "list_objects"
            query.pop("ContinuationToken", None)
            query["Marker"] = after
        raise too_large(f"the listing of {shown}", _MAX_PAGES, unit="pages")

    def _page(self, operation: str, query: Mapping[str, str], cancel_token: CancelToken) -> Mapping[str, Any]:
        """One page. Raises ValueError for a document that is not a listing, such as HTML."""
        page: Mapping[str, Any] = self._buckets.ask(
            query["Bucket"], cancel_token, lambda client: getattr(client, operation)(**query)
        )
        if not any(name in page for name in _OF_A_PAGE):
            raise ValueError("not a listing")
        return page


def _is_truncated(page: Mapping[str, Any], keys: int) -> bool:
    """Whether more pages of the listing follow this one."""
    if "IsTruncated" in page:
        return bool(page["IsTruncated"])
    is_full = keys >= (page.get("MaxKeys") or _PAGE_KEYS)
    return bool(page.get("NextContinuationToken") or page.get("NextMarker")) or is_full

"""A loopback HTTP server that serves files as RFC 9110 says, until a test installs a fault.

    request -> find: what stands at this path? -> a File, or a Reply that is no file (404, redirect)
            -> Fault.stored(file)               the file this server pretends to hold
            -> answer(seen, file)               what a correct server says: 200, 206, 304, 412 or 416
            -> Fault.reply(seen, reply)         what goes out instead
            -> holds, rate, ending              when it goes out, and how it stops

`content` is bytes, `replies` a request and its right answer, `faults` the wrong ones, `certificates` right
and wrong TLS, `server` the server. A new fault is one frozen dataclass that overrides `stored` or `reply`, a
new kind of server overrides `Server.find`. What no HTTP library would say is in `tests.ground.scripted`.
"""

from tests.ground.origin.certificates import Tls, certify
from tests.ground.origin.content import Content, Disk, Memory, Patched, Unending, noise
from tests.ground.origin.faults import (
    ChangeETag,
    Chunked,
    ContentRange,
    Endless,
    Fault,
    Flip,
    Gzip,
    IgnoreRange,
    Late,
    LoginPage,
    NoContentRange,
    Redirect,
    Reset,
    RestlessETag,
    Saying,
    Short,
    Stall,
    Status,
    Swap,
    TooLong,
    Trickle,
    WrongRange,
    WrongTotal,
    Zeroed,
)
from tests.ground.origin.replies import Ending, File, Reply, Seen, answer, extent_asked, quoted
from tests.ground.origin.server import Hold, Origin, Server

__all__ = [
    "ChangeETag",
    "Chunked",
    "Content",
    "ContentRange",
    "Disk",
    "Ending",
    "Endless",
    "Fault",
    "File",
    "Flip",
    "Gzip",
    "Hold",
    "IgnoreRange",
    "Late",
    "LoginPage",
    "Memory",
    "NoContentRange",
    "Origin",
    "Patched",
    "Redirect",
    "Reply",
    "Reset",
    "RestlessETag",
    "Saying",
    "Seen",
    "Server",
    "Short",
    "Stall",
    "Status",
    "Swap",
    "Tls",
    "TooLong",
    "Trickle",
    "Unending",
    "WrongRange",
    "WrongTotal",
    "Zeroed",
    "answer",
    "certify",
    "extent_asked",
    "noise",
    "quoted",
]

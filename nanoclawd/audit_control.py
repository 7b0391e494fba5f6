"""The part of io.nanoclaw.Control that is about the audit trail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from hashlib import sha256

from nanoclawd import journal, limits
from nanoclawd.audit import Audit
from nanoclawd.db import Database
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.ids import parse_credential_name
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json

#: What changes something, and so has a row.
NOTED = {
    *(
        "AddAgent",
        "SetAgent",
        "RemoveAgent",
        "SetBudget",
        "SetGuard",
        "SetGuardApprovals",
        "StartAgent",
        "StopAgent",
        "RestartAgent",
        "AddRule",
    ),
    *("RetryDeadLetter", "DropDeadLetter", "BuildImage", "Backup", "StopAll", "StartAll"),
    *("WireChat", "UnwireChat", "BlockChat", "LinkPerson", "SetRole", "SetRoleOf", "Pair"),
    *("ResetSession", "CloseSession", "AddDestination", "RemoveDestination"),
    *("AddChannel", "RestartChannel", "RemoveChannel"),
}
STOPS = {"StopAgent", "StopAll"}  #: done at once, whatever becomes of the row


class AuditControl:
    def __init__(self, db: Database, audit: Audit) -> None:
        self._db = db
        self._audit = audit
        self.methods = {
            "ListAudit": Method(handler=self._list),
            "VerifyAudit": Method(handler=self._verify),
            "NoteSecret": Method(handler=self._note_secret),
        }

    def noted(self, name: str, method: Method) -> Method:
        """Return `method`, with a row on disk before it is done, and one more if it fails.

        Without room for the row it is not done, unless it is a stop.
        """
        if name not in NOTED:
            return method

        async def answer(call: Call) -> Json:
            detail = {key: value for key, value in call.parameters.items() if value is not None}
            agent = detail.pop("name", None) or detail.pop("agent", "")
            if text := detail.pop("instructions", ""):
                detail["instructions"] = f"sha256 {sha256(text.encode()).hexdigest()}"
            if name not in STOPS:
                await self._audit.note(name, detail, agent=agent)
            try:
                reply = await method.handler(call)
            except NanoclawError as exc:
                await self.note_late(name, {**detail, "failed": exc.code}, agent)
                raise
            if name in STOPS:
                await self.note_late(name, detail, agent)
            return reply

        return Method(handler=answer, more=method.more)

    async def note_late(self, name: str, detail: Json, agent: str = "") -> None:
        """Add a row of what is done in any case."""
        try:
            await self._audit.note(name, detail, agent=agent)
        except Unavailable as exc:
            journal.error("audit-failed", f"{exc}; the audit trail has no row of it", method=name)

    async def _list(self, call: Call) -> Json:
        wanted = {name: call.parameters[name] for name in ("agent", "kind")}
        wanted["since"] = round((call.parameters["since"] or 0) * 1000)
        first, limit = 0, call.parameters["limit"]
        if limit is not None:
            if limit < 1:
                raise Refused("limit: must be from 1 on", hint="leave it out for all")
            ((first,),) = await self._db.read("find_audit", limit=limit, **wanted)

        async def rows() -> AsyncIterator[Json]:
            after = (first or 0) - 1
            while found := await self._db.read(
                "list_audit", first=after + 1, limit=limits.AUDIT_AT_ONCE, **wanted
            ):
                for row in found:
                    yield {"row": {**dict(row), "at": row["at"] / 1000}}
                    after = row["seq"]

        return await call.send_all(rows(), {"row": None})

    async def _verify(self, call: Call) -> Json:
        return asdict(await self._audit.verify())

    async def _note_secret(self, call: Call) -> Json:
        name = parse_credential_name(call.parameters["secret"])
        await self._audit.note(call.parameters["event"], {"credential": name})
        return {}

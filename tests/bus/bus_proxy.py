"""A TCP proxy in front of a server, to cut, slow and silence connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class Proxy:
    """Forwards a loopback port; its knobs may be turned from any thread."""

    def __init__(self, target_port):
        self._target = target_port
        self.delay_seconds = 0.0
        self.is_silent = False
        """Swallows everything: connections stay open and nothing comes."""
        self.cut_replies = False
        """Closes a connection when the server answers on it, before the answer gets through."""
        self._loop = asyncio.new_event_loop()
        self._writers = set()
        ready = threading.Event()

        def run():
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(
                asyncio.start_server(self._serve, "127.0.0.1", 0)
            )
            self.port = server.sockets[0].getsockname()[1]
            self._server = server
            ready.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    async def _serve(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(
            self._pump(reader, far_writer, is_reply=False),
            self._pump(far_reader, writer, is_reply=True),
        )

    async def _pump(self, reader, writer, *, is_reply):
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                if is_reply and self.cut_replies:
                    self._cut_all()
                    break
                while self.is_silent:
                    await asyncio.sleep(0.01)
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)

    def _cut_all(self):
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()

    def cut(self):
        """Closes all connections at once."""
        self._loop.call_soon_threadsafe(self._cut_all)

    def close(self):
        async def finish():
            self._server.close()
            self._cut_all()
            own = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not own]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

"""Running coroutines in tests."""

from __future__ import annotations

import asyncio


def run_async(main, *transports):
    """Runs a coroutine and closes the transports in its loop."""

    async def whole():
        try:
            return await asyncio.wait_for(main, 60)
        finally:
            for transport in transports:
                await transport.close()

    return asyncio.run(whole())

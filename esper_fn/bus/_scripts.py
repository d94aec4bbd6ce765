"""What has to happen in one piece on the server, as Lua for Redis 7.0 and Valkey.

Every key carries the run's name in braces, so that a cluster keeps a run on one node.
"""

from __future__ import annotations

PUBLISH = """
-- KEYS: stream, producer's last number, generation
-- ARGV: first number, limit, refuses?, seconds to remember the producer, group, a name for a
--       new generation, then payload and signature of each entry
local generation = redis.call('GET', KEYS[3])
if not generation then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local first, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local count = (#ARGV - 6) / 2
local last = tonumber(redis.call('GET', KEYS[2]) or '-1')
local skip = math.max(0, last - first + 1)
if skip >= count then return {0, generation} end
local refuses = ARGV[3] == '1'
if refuses then
  local new = count - skip
  local kept = redis.call('XLEN', KEYS[1])
  if kept + new > limit then
    local waiting = kept
    if kept + new <= 10 * limit then
      for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        local of = {}
        for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
        if string.sub(of['name'], 1, #ARGV[5]) == ARGV[5] then
          -- Entries removed from the middle leave the lag unknown: count all then.
          if of['lag'] then waiting = of['lag'] + of['pending'] end
        end
      end
    end
    if waiting + new > limit then return {-1, waiting} end
  end
end
for i = skip, count - 1 do
  local payload, signature = ARGV[7 + 2 * i], ARGV[8 + 2 * i]
  if refuses then
    if signature == '' then redis.call('XADD', KEYS[1], '*', 'm', payload)
    else redis.call('XADD', KEYS[1], '*', 'm', payload, 's', signature) end
  else
    if signature == '' then redis.call('XADD', KEYS[1], 'MAXLEN', '~', limit, '*', 'm', payload)
    else
      redis.call('XADD', KEYS[1], 'MAXLEN', '~', limit, '*', 'm', payload, 's', signature)
    end
  end
end
redis.call('SET', KEYS[2], string.format('%.0f', first + count - 1), 'EX', ARGV[4])
return {count - skip, generation}
"""

ATTACH = """
-- KEYS: lease, run, generation, sequences, attempts, then the command streams
-- ARGV: holder, lease in ms, least epoch, takes over?, group, a name for a new generation,
--       then a cursor for each stream ('' for the last settled entry)
local held = redis.call('GET', KEYS[1])
if held and ARGV[4] ~= '1' then
  local holder = string.match(held, '^%d+ (.*)$')
  if holder ~= ARGV[1] then return {0, holder, redis.call('PTTL', KEYS[1])} end
end
local generation = redis.call('GET', KEYS[3])
if not generation then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local epoch = math.max(tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0'), tonumber(ARGV[3]))
epoch = epoch + 1
redis.call('HSET', KEYS[2], 'epoch', epoch, 'number', 0)
redis.call('SET', KEYS[1], string.format('%.0f %s', epoch, ARGV[1]), 'PX', ARGV[2])
local function before(a, b) -- a <= b
  local a1, a2 = string.match(a, '(%d+)-(%d+)')
  local b1, b2 = string.match(b, '(%d+)-(%d+)')
  a1, a2, b1, b2 = tonumber(a1), tonumber(a2), tonumber(b1), tonumber(b2)
  return a1 < b1 or (a1 == b1 and a2 <= b2)
end
local cursors, leftovers = {}, {}
for i = 6, #KEYS do
  local stream, cursor = KEYS[i], ARGV[i + 1]
  if cursor == '' then cursor = redis.call('HGET', KEYS[2], 'cursor:' .. stream) or '0-0' end
  cursors[#cursors + 1] = cursor
  local counted = false
  redis.call('XGROUP', 'CREATE', stream, ARGV[5] .. epoch, cursor, 'MKSTREAM')
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local name = group[2]
    if string.sub(name, 1, #ARGV[5]) == ARGV[5] and name ~= ARGV[5] .. epoch then
      local from = '-'
      while true do
        local pending = redis.call('XPENDING', stream, name, from, '+', 500)
        for _, row in ipairs(pending) do
          local found = redis.call('XRANGE', stream, row[1], row[1])
          if #found == 0 then
            redis.call('HDEL', KEYS[5], stream .. ' ' .. row[1])
          elseif before(row[1], cursor) then
            leftovers[#leftovers + 1] = {i - 6, row[1], found[1][2], row[4] + 1}
          elseif not counted then
            -- The first in line was being carried out; those behind it are not suspected.
            counted = true
            redis.call('HINCRBY', KEYS[5], stream .. ' ' .. row[1], 1)
          end
        end
        if #pending < 500 then break end
        from = '(' .. pending[#pending][1]
      end
      -- Wakes whoever reads in it.
      redis.call('XGROUP', 'DESTROY', stream, name)
    end
  end
end
local time = redis.call('TIME')
return {1, epoch, generation, cursors, redis.call('HGETALL', KEYS[4]), leftovers,
        redis.call('HGETALL', KEYS[5]), time[1], time[2]}
"""

RENEW = """
-- KEYS: lease, run. ARGV: holder, epoch, lease in ms
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[2] then
  return {0, redis.call('GET', KEYS[1]) or '', redis.call('HGET', KEYS[2], 'epoch') or '0'}
end
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[3])
local time = redis.call('TIME')
return {1, time[1], time[2]}
"""

RELEASE = """
-- KEYS: lease. ARGV: holder, epoch
if redis.call('GET', KEYS[1]) == ARGV[2] .. ' ' .. ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

SETTLE = """
-- KEYS: lease, run, sequences, attempts, outcomes, dead, then the command streams
-- ARGV: epoch, number, group, limits of outcomes and dead letters, then counts of outcomes, dead
--       letters and sequences, then for each stream the cursor ('' for none) and the number of
--       entries done, then all of these in order
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then
  return {0, redis.call('GET', KEYS[1]) or '', redis.call('HGET', KEYS[2], 'epoch') or '0'}
end
if tonumber(ARGV[2]) <= tonumber(redis.call('HGET', KEYS[2], 'number') or '0') then
  return {1}
end
redis.call('HSET', KEYS[2], 'number', ARGV[2])
local at = 9
local counts = {}
for i = 7, #KEYS do
  if ARGV[at] ~= '' then redis.call('HSET', KEYS[2], 'cursor:' .. KEYS[i], ARGV[at]) end
  counts[i] = tonumber(ARGV[at + 1])
  at = at + 2
end
local tried = redis.call('EXISTS', KEYS[4]) == 1
for i = 7, #KEYS do
  local last = at + counts[i] - 1
  while at <= last do
    local to = math.min(last, at + 999) -- what Lua's stack surely holds
    redis.call('XACK', KEYS[i], ARGV[3] .. ARGV[1], unpack(ARGV, at, to))
    if tried then
      for one = at, to do redis.call('HDEL', KEYS[4], KEYS[i] .. ' ' .. ARGV[one]) end
    end
    at = to + 1
  end
end
for _ = 1, tonumber(ARGV[6]) do
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[4], '*', 'm', ARGV[at], 's', ARGV[at + 1])
  at = at + 2
end
for _ = 1, tonumber(ARGV[7]) do
  redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[5], '*', 'm', ARGV[at], 's', ARGV[at + 1])
  at = at + 2
end
for _ = 1, tonumber(ARGV[8]) do
  if ARGV[at + 1] == '-1' then redis.call('HDEL', KEYS[3], ARGV[at])
  else redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1]) end
  at = at + 2
end
return {1}
"""

BURY = """
-- KEYS: stream, dead. ARGV: group, limit, payload, signature, then the entries
local count = 0
for i = 5, #ARGV do count = count + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) end
if count > 0 then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'm', ARGV[3], 's', ARGV[4])
end
return count
"""

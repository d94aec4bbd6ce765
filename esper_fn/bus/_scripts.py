"""The transactions of the bus, as Lua scripts for Redis 7.0 and Valkey.

Every key carries the run's name in braces, so that a cluster keeps a run on one node.
"""

from __future__ import annotations

PUBLISH = """
-- KEYS: stream, producer's last number, generation, run
-- ARGV: first number, limit, refuses?, seconds to remember the producer, group, a name for a
--       new generation, identity of the run ('' for any), then payload and signature of each entry
local generation = redis.call('GET', KEYS[3])
if not generation or #generation > 100 then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local first, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local count = (#ARGV - 7) / 2
local last = tonumber(string.match(redis.call('GET', KEYS[2]) or '', '^%d+$') or '-1')
local skip = math.max(0, last - first + 1)
if skip >= count then return {0, generation} end
if ARGV[7] ~= '' then
  local identity = redis.call('HGET', KEYS[4], 'identity') or ''
  if identity ~= ARGV[7] then return {-2, string.sub(identity, 1, 100)} end
end
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
  local payload, signature = ARGV[8 + 2 * i], ARGV[9 + 2 * i]
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

_NEWEST = """
local function newest(run) -- epoch and holder of the newest lease; '0' and '' where none is sound
  local epoch = redis.call('HGET', run, 'epoch')
  local owner = redis.call('HGET', run, 'owner') or ''
  if #owner > 1000 then return '0', '' end
  local number, holder = string.match(owner, '^(%d+) (.+)$')
  if number and number == epoch and #number < 16 then return number, holder end
  return '0', ''
end
local function tell(run, identity)
  if identity == '' then redis.call('HDEL', run, 'identity')
  elseif redis.call('HGET', run, 'identity') ~= identity then
    redis.call('HSET', run, 'identity', identity)
  end
end
"""

_BEFORE = """
local function before(a, b) -- a <= b
  local a1, a2 = string.match(a, '(%d+)-(%d+)')
  local b1, b2 = string.match(b, '(%d+)-(%d+)')
  a1, a2, b1, b2 = tonumber(a1), tonumber(a2), tonumber(b1), tonumber(b2)
  return a1 < b1 or (a1 == b1 and a2 <= b2)
end
"""

_GROUPS = """
local function groups(stream, other) -- the last id of each; that of `other` is the stream's
  -- By a group made for it: XINFO STREAM would bring entries along, which may be of any size.
  redis.pcall('XGROUP', 'CREATE', stream, other, '$')
  local found = {}
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    found[of['name']] = of['last-delivered-id']
  end
  redis.call('XGROUP', 'DESTROY', stream, other)
  return found
end
local function is_exhausted(last)
  return last == '18446744073709551615-18446744073709551615'
end
"""

ATTACH = (
    _NEWEST
    + _BEFORE
    + """
-- KEYS: lease, run, generation, sequences, attempts, then the command streams
-- ARGV: holder, lease in ms, least epoch, takes over?, group, a name for a new generation,
--       identity of the run, count attempts?, then a cursor for each stream ('' for the last
--       settled entry)
-- Anybody may have written to these keys: what cannot be ours counts as missing.
local held = redis.call('GET', KEYS[1]) or ''
if #held > 1000 then held = '' end
local held_epoch, holder = string.match(held, '^(%d+) (.+)$')
local left = redis.call('PTTL', KEYS[1])
if holder and left >= 0 and ARGV[4] ~= '1' and holder ~= ARGV[1] then
  return {0, holder, left, held_epoch}
end
local generation = redis.call('GET', KEYS[3])
if not generation or #generation > 100 then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local epoch = tonumber(ARGV[3])
for _, text in ipairs({redis.call('HGET', KEYS[2], 'epoch') or '', held_epoch or ''}) do
  if #text < 16 and string.match(text, '^%d+$') then epoch = math.max(epoch, tonumber(text)) end
end
epoch = string.format('%.0f', epoch + 1)
local owner = epoch .. ' ' .. ARGV[1]
redis.call('HSET', KEYS[2], 'epoch', epoch, 'owner', owner, 'number', 0)
tell(KEYS[2], ARGV[7])
redis.call('SET', KEYS[1], owner, 'PX', ARGV[2])
local function numbers(hash) -- names and whole numbers, as far as they can be ours
  local out, room, all = {}, 1048576, redis.call('HGETALL', hash)
  for i = 1, #all, 2 do
    if #all[i] <= 256 and #all[i + 1] <= 17 and room > 0 then
      out[#out + 1], out[#out + 2] = all[i], all[i + 1]
      room = room - #all[i]
    end
  end
  return out
end
local cursors, leftovers, emptied = {}, {}, {}
for i = 6, #KEYS do
  local stream, cursor = KEYS[i], ARGV[i + 3]
  if cursor == '' then cursor = redis.call('HGET', KEYS[2], 'cursor:' .. stream) or '0-0' end
  if not string.match(cursor, '^%d+%-%d+$') then cursor = '0-0' end
  redis.pcall('XGROUP', 'CREATE', stream, ARGV[5] .. epoch, '0-0', 'MKSTREAM')
  local info, last = redis.call('XINFO', 'STREAM', stream), '0-0'
  for at = 1, #info, 2 do
    if info[at] == 'last-generated-id' then last = info[at + 1] end
  end
  if not before(cursor, last) then
    -- This is not the stream that the cursor is of.
    emptied[#emptied + 1] = i - 6
    cursor = '0-0'
  end
  redis.call('XGROUP', 'SETID', stream, ARGV[5] .. epoch, cursor)
  cursors[#cursors + 1] = cursor
  local counted = ARGV[8] ~= '1'
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
            -- No run takes in more at once.
            if #leftovers < 4096 then leftovers[#leftovers + 1] = {i - 6, row[1], row[4] + 1} end
          elseif not counted then
            -- The first in line was being carried out; those behind it are not suspected.
            counted = true
            local field = stream .. ' ' .. row[1]
            if type(redis.pcall('HINCRBY', KEYS[5], field, 1)) == 'table' then
              redis.call('HSET', KEYS[5], field, 1)
            end
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
return {1, tonumber(epoch), generation, cursors, numbers(KEYS[4]), leftovers, numbers(KEYS[5]),
        time[1], time[2], emptied}
"""
)

RENEW = (
    _NEWEST
    + _BEFORE
    + _GROUPS
    + """
-- KEYS: lease, run, then the command streams. ARGV: holder, epoch, lease in ms, group, identity,
--       then for each stream the last entry that the run has taken in ('' where it does not say)
local function is_skipped(stream, group, taken, last) -- an entry that will not be handed out?
  if taken == '' or before(last, taken) then return false end
  -- Nothing that the run has not taken in is settled: what it was handed is pending, for it.
  local pending = redis.call('XPENDING', stream, group, '(' .. taken, '+', 1)[1]
  if not pending or pending[2] ~= ARGV[1] then return true end
  local first = redis.call('XRANGE', stream, '(' .. taken, '+', 'COUNT', 1)[1]
  return first ~= nil and not before(pending[1], first[1])
end
local epoch, holder = newest(KEYS[2])
if epoch ~= ARGV[2] or holder ~= ARGV[1] then return {0, epoch, holder} end
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[3])
tell(KEYS[2], ARGV[5])
local exhausted = {}
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return {0, '0', ''} end
  local group, other = ARGV[4] .. ARGV[2], ARGV[4] .. 'last'
  local last = groups(KEYS[i], other)
  if not last[group] or is_skipped(KEYS[i], group, ARGV[i + 3], last[group]) then
    return {0, '0', ''}
  end
  if is_exhausted(last[other]) then exhausted[#exhausted + 1] = i - 3 end
end
local time = redis.call('TIME')
return {1, time[1], time[2], exhausted}
"""
)

RELEASE = """
-- KEYS: lease. ARGV: holder, epoch
if redis.call('GET', KEYS[1]) == ARGV[2] .. ' ' .. ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

SETTLE = (
    _NEWEST
    + """
-- KEYS: lease, run, sequences, attempts, outcomes, dead, then the command streams
-- ARGV: epoch, number, group, limits of outcomes and dead letters, then counts of outcomes, dead
--       letters and sequences, the holder, then for each stream the cursor ('' for none) and the
--       number of entries done, then all of these in order
local epoch, holder = newest(KEYS[2])
if epoch ~= ARGV[1] or holder ~= ARGV[9] then return {0, epoch, holder} end
local number = tonumber(ARGV[2])
local settled = tonumber(redis.call('HGET', KEYS[2], 'number') or '0') or 0
-- Nobody else counts within a lease: a higher number is somebody's garbage.
if settled > number then return {0, '0', ''} end
if settled == number then return {1} end
local at = 10
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
-- Last: where something above fails, all of it is repeated.
redis.call('HSET', KEYS[2], 'number', ARGV[2])
return {1}
"""
)

REPAIR = """
-- KEYS: of a run. ARGV: the type of each. Removes those of another type, which cannot be ours.
local removed = {}
for i, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key)['ok']
  if found ~= 'none' and found ~= ARGV[i] then
    redis.call('DEL', key)
    removed[#removed + 1] = key .. ' (' .. found .. ')'
  end
end
return removed
"""

EXHAUSTED = (
    _GROUPS
    + """
-- KEYS: of a run. ARGV: group. Returns the streams that can take no more entries.
local found = {}
for _, key in ipairs(KEYS) do
  local other = ARGV[1] .. 'last'
  if redis.call('TYPE', key)['ok'] == 'stream' and is_exhausted(groups(key, other)[other]) then
    found[#found + 1] = key
  end
end
return found
"""
)

PORTION = """
-- Entries of a stream: at most so many, until they have so many bytes; only the size of those that
-- are too large or not ours. Returns them, whether these were all, and where the next ones begin.
-- KEYS: stream. ARGV: entries at most, bytes, bytes of a whole entry at most, then one of
--   after, entry before the first | last | named, entries
--   new, group, consumer, last entry that surely came | idle, group, consumer, ms, first
local count, room, largest, kind = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local stream, rows, is_all, at, is_large = KEYS[1], {}, 0, '', false
local function has_room() return #rows < count and room > 0 end
local function add(row, deliveries)
  local fields, size = row[2], 0
  for _, part in ipairs(fields) do size = size + #part end
  local payload, signature, withheld = '', '', size
  if fields[1] == 'm' and size <= largest then
    payload, withheld = fields[2], 0
    if fields[3] == 's' then signature = fields[4] end
  end
  room = room - #payload - withheld
  is_large = is_large or size > largest
  rows[#rows + 1] = {row[1], withheld, payload, signature, deliveries}
end
-- One by one: what the server holds of them here is never more than the largest.
if kind == 'after' then
  at = ARGV[5]
  while has_room() and is_all == 0 do
    local row = redis.call('XRANGE', stream, '(' .. at, '+', 'COUNT', 1)[1]
    if row then
      add(row, 1)
      at = row[1]
    else is_all = 1 end
  end
elseif kind == 'last' then
  local row = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  if row then add(row, 1) end
elseif kind == 'named' then
  local next = 5
  while has_room() and next <= #ARGV do
    local row = redis.call('XRANGE', stream, ARGV[next], ARGV[next])[1]
    if row then add(row, 1) end
    next = next + 1
  end
  at = tostring(next - 5)
  if next > #ARGV then is_all = 1 end
elseif kind == 'new' then
  local from = ARGV[7]
  while has_room() and is_all == 0 do
    local answer = redis.call(
      'XREADGROUP', 'GROUP', ARGV[5], ARGV[6], 'COUNT', 1, 'STREAMS', stream, from)
    local row = answer and answer[1][2][1]
    if row then
      if from ~= '>' then from = row[1] end
      if row[2] then add(row, 1) else redis.call('XACK', stream, ARGV[5], row[1]) end
    elseif from == '>' then is_all = 1
    else from = '>' end
  end
else
  at = ARGV[8]
  while has_room() and is_all == 0 do
    local answer = redis.call(
      'XAUTOCLAIM', stream, ARGV[5], ARGV[6], ARGV[7], at, 'COUNT', 1)
    at = answer[1]
    for _, row in ipairs(answer[2]) do
      local pending = redis.call('XPENDING', stream, ARGV[5], row[1], row[1], 1)
      if row[2] then add(row, pending[1] and pending[1][4] or 1) end
    end
    if at == '0-0' then is_all = 1 end
  end
end
if is_large then collectgarbage() end
return {rows, is_all, at}
"""

RUNS = """
-- ARGV: cursor, pattern, bytes of a name at most. Keys as SCAN gives them, but short.
local answer = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 500)
local names = {}
for _, name in ipairs(answer[2]) do
  if #name <= tonumber(ARGV[3]) then names[#names + 1] = name end
end
return {answer[1], names}
"""

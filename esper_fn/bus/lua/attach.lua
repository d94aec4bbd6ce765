-- KEYS: lease, run, generation, sequences, attempts, then the command streams
-- ARGV: holder, lease in ms, least epoch, take over?, group, a name for a new generation,
--       identity of the run, count attempts?, then a cursor for each stream ('' for the last
--       settled entry)
-- Anybody may have written to these keys: foreign values count as missing.
local lease = redis.call('GET', KEYS[1]) or ''
if #lease > 1000 then lease = '' end
local lease_epoch, holder = string.match(lease, '^(%d+) (.+)$')
local left = redis.call('PTTL', KEYS[1])
if holder and left >= 0 and ARGV[4] ~= '1' and holder ~= ARGV[1] then
  return {0, holder, left, lease_epoch}
end
local generation = redis.call('GET', KEYS[3])
if not generation or #generation > 100 then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local epoch = tonumber(ARGV[3])
for _, text in ipairs({redis.call('HGET', KEYS[2], 'epoch') or '', lease_epoch or ''}) do
  if #text < 16 and string.match(text, '^%d+$') then epoch = math.max(epoch, tonumber(text)) end
end
epoch = string.format('%.0f', epoch + 1)
local owner = epoch .. ' ' .. ARGV[1]
redis.call('HSET', KEYS[2], 'epoch', epoch, 'owner', owner, 'number', 0)
store_identity(KEYS[2], ARGV[7])
redis.call('SET', KEYS[1], owner, 'PX', ARGV[2])
local function numbers(hash) -- names and whole numbers, without foreign values
  local out, room, all = {}, 1048576, redis.call('HGETALL', hash)
  for i = 1, #all, 2 do
    if #all[i] <= 256 and #all[i + 1] <= 17 and room > 0 then
      out[#out + 1], out[#out + 2] = all[i], all[i + 1]
      room = room - #all[i]
    end
  end
  return out
end
local cursors, leftovers, lost = {}, {}, {}
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
    -- The cursor belongs to another stream, which was lost.
    lost[#lost + 1] = i - 6
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
          local entry = redis.call('XRANGE', stream, row[1], row[1])
          if #entry == 0 then
            redis.call('HDEL', KEYS[5], stream .. ' ' .. row[1])
          elseif before(row[1], cursor) then
            -- No run accepts more at once.
            if #leftovers < 4096 then leftovers[#leftovers + 1] = {i - 6, row[1], row[4] + 1} end
          elseif not counted then
            -- The first one was running; those behind it are not suspects.
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
      -- This wakes its readers.
      redis.call('XGROUP', 'DESTROY', stream, name)
    end
  end
end
local time = redis.call('TIME')
return {1, tonumber(epoch), generation, cursors, numbers(KEYS[4]), leftovers, numbers(KEYS[5]),
        time[1], time[2], lost}

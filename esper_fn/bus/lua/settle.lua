-- KEYS: lease, run, sequences, attempts, outcomes, dead, then the command streams
-- ARGV: epoch, number, group, limits of outcomes and dead letters, then counts of outcomes, dead
--       letters and sequences, the holder, then for each stream the cursor ('' for none) and the
--       number of entries to acknowledge, then all of these in order
local epoch, holder = newest(KEYS[2])
if epoch ~= ARGV[1] or holder ~= ARGV[9] then return {0, epoch, holder} end
local number = tonumber(ARGV[2])
local settled = tonumber(redis.call('HGET', KEYS[2], 'number') or '0') or 0
-- Nobody else counts within a lease: a higher number is somebody's garbage.
if settled > number then return {0, '0', ''} end
if settled == number then return {1} end
local index = 10
local counts = {}
for i = 7, #KEYS do
  if ARGV[index] ~= '' then redis.call('HSET', KEYS[2], 'cursor:' .. KEYS[i], ARGV[index]) end
  counts[i] = tonumber(ARGV[index + 1])
  index = index + 2
end
local has_attempts = redis.call('EXISTS', KEYS[4]) == 1
for i = 7, #KEYS do
  local last = index + counts[i] - 1
  while index <= last do
    local to = math.min(last, index + 999) -- what Lua's stack surely holds
    redis.call('XACK', KEYS[i], ARGV[3] .. ARGV[1], unpack(ARGV, index, to))
    if has_attempts then
      for entry = index, to do
        redis.call('HDEL', KEYS[4], KEYS[i] .. ' ' .. ARGV[entry])
      end
    end
    index = to + 1
  end
end
for _ = 1, tonumber(ARGV[6]) do
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[4], '*', 'm', ARGV[index], 's', ARGV[index + 1])
  index = index + 2
end
for _ = 1, tonumber(ARGV[7]) do
  redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[5], '*', 'm', ARGV[index], 's', ARGV[index + 1])
  index = index + 2
end
for _ = 1, tonumber(ARGV[8]) do
  if ARGV[index + 1] == '-1' then redis.call('HDEL', KEYS[3], ARGV[index])
  else redis.call('HSET', KEYS[3], ARGV[index], ARGV[index + 1]) end
  index = index + 2
end
-- At the end: if something above fails, all of it is repeated.
redis.call('HSET', KEYS[2], 'number', ARGV[2])
return {1}

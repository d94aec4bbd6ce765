-- KEYS: lease, run, then the command streams. ARGV: holder, epoch, lease in ms, group, identity,
--       then for each stream the last entry that the run has read ('' if unknown)
local function is_skipped(stream, group, read, last) -- will some entry not be delivered?
  if read == '' or before(last, read) then return false end
  -- Nothing that the run has not read is settled: what was delivered to it is pending.
  local pending = redis.call('XPENDING', stream, group, '(' .. read, '+', 1)[1]
  if not pending or pending[2] ~= ARGV[1] then return true end
  local first = redis.call('XRANGE', stream, '(' .. read, '+', 'COUNT', 1)[1]
  return first ~= nil and not before(pending[1], first[1])
end
local epoch, holder = newest(KEYS[2])
if epoch ~= ARGV[2] or holder ~= ARGV[1] then return {0, epoch, holder} end
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[3])
store_identity(KEYS[2], ARGV[5])
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

-- KEYS: keys of a run. ARGV: group. Returns the streams that cannot take more entries.
local streams = {}
for _, key in ipairs(KEYS) do
  local other = ARGV[1] .. 'last'
  if redis.call('TYPE', key)['ok'] == 'stream' and is_exhausted(groups(key, other)[other]) then
    streams[#streams + 1] = key
  end
end
return streams

// Package filter has devices that stand between a volume's device and its transport:
// they are a [block.Device] themselves and do something with every request that passes.
//
//   - [Meter] counts requests and measures how long the device takes for them.
//   - [Limiter] keeps requests to a rate.
//
// A server puts them together as transport → Limiter → Meter → device, so that the time
// which a request waits for its limit does not look like a slow device.
//
// Neither allocates for a request, and neither costs one more than some ten nanoseconds
// unless it makes it wait; the benchmarks say how many.
//
// [block.Device]: the contract of package block
package filter

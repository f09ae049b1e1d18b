// Package metrics shows Prometheus what a supervisor's attachments do: see docs/metrics.md.
//
// Nothing is collected between scrapes. At each one all servers are asked at the same
// time, and one that does not answer in time is left out, except for what the supervisor
// knows of it.
package metrics

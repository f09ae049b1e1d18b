// Package block is the contract between what holds a disk's bytes and what serves
// them: a virtual disk is a [Device], whatever image formats, chains or filters
// stand behind it, and whatever transport stands before it.
//
// # The three promises
//
// Every Device keeps them, in the order in which they matter:
//
//   - P1, completed is visible. Once a write returns, every later read sees it,
//     also after the process is killed at any instruction and another opens the
//     image on the same node.
//   - P2, flushed is durable. Once Flush returns, every write that had returned
//     before Flush was called survives power loss of the node.
//   - P3, nothing else is harmed. Power loss, a full store, an I/O error or a kill
//     at any point never damages data that had been flushed before, never exposes
//     another cluster's old contents, and leaves an image other tools open without
//     repair.
//
// # Errors
//
// Errors wrap the sentinels of errors.go; [Errno] is the one place where they
// become error numbers.
//
// The package imports the standard library only, and nothing of this module.
package block

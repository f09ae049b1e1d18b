// Package vfs is the file system under images and stores: a small interface with a
// host implementation ([Dir]), one in memory that can lose power ([Mem]), and a
// wrapper that injects failures ([Inject]). Everything that touches a store goes
// through it, so that every promise about data can be tested at every step.
//
// # Names
//
// A name is relative to the file system's root, slash-separated and clean: "a/b",
// never "/a", "../a" or "a//b"; "." is the root. Other names fail with fs.ErrInvalid.
// A [Dir] follows no symbolic link out of its root.
//
// # Durability
//
// What is written is visible to every later read at once. It survives power loss
// after File.Sync (contents, size) and FS.SyncDir (names). Until then a crash may
// keep any subset of the written 512-byte sectors, in any order, with the file's
// old or new size, and any subset of the directory's changes. A sector is never torn.
//
// # Errors
//
// Missing and existing files give fs.ErrNotExist and fs.ErrExist. A conflicting
// lock gives block.ErrLocked. What the file system below cannot do gives
// errors.ErrUnsupported.
package vfs

// Command conformance
package main

func main() {}

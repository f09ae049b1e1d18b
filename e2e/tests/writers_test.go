package tests

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// writer is one that runs in a pod.
type writer struct {
	e              *env
	pod, node, log string
	last           line // at the last mark
}

// writerBlocks is how much writers write. Reading one takes emulated machines 10 ms.
const writerBlocks = "-blocks=512"

// write starts a pod with a writer for each of its claims, and returns when all have begun.
// flushed is what a former run said, for each.
func (e *env) write(p pod, run int, flushed ...int) []*writer {
	e.Helper()
	e.writerPod(&p, run, flushed...)
	return e.writing(p)
}

// writerPod makes a pod with a writer for each of its claims.
func (e *env) writerPod(p *pod, run int, flushed ...int) {
	e.Helper()
	var paths []string
	for _, name := range p.files {
		paths = append(paths, "/"+name+"/written")
	}
	for _, name := range p.blocks {
		paths = append(paths, "/dev/"+name)
	}
	for i, path := range paths {
		// They rest, for the machines' processors have other things to do, too.
		args := []string{"-path=" + path, writerBlocks, "-rest=250ms", "-print=500ms", fmt.Sprint("-run=", run)}
		if flushed != nil {
			args = append(args, fmt.Sprint("-flushed=", flushed[i]))
		}
		p.writers = append(p.writers, args)
	}
	e.pod(*p)
}

// writing waits until all writers of a pod have begun.
func (e *env) writing(p pod) []*writer {
	e.Helper()
	e.running(p.name)
	node, logs := e.where(p.name)
	var ws []*writer
	for i := range p.writers {
		ws = append(ws, &writer{e: e, pod: p.name, node: node, log: fmt.Sprintf("%s/writer-%d/0.log", logs, i)})
	}
	for _, w := range ws {
		w.advances()
	}
	return ws
}

// line is what a writer printed when it had flushed.
type line struct {
	flushed int
	at      time.Time
	longest time.Duration
}

var flushedLine = regexp.MustCompile(`flushed (\d+) at (\d+) longest (\d+)`)

// allLines is more lines than a log has.
const allLines = 1000000

// lines reads the end of a writer's log on its node, whether the cluster reaches that or not.
func (w *writer) lines(end int) (lines []line, text string) {
	w.e.Helper()
	text = w.e.on(w.node, fmt.Sprintf("tail -n %d %s 2>/dev/null || true", end, w.log))
	for _, m := range flushedLine.FindAllStringSubmatch(text, -1) {
		var n [3]int
		for i := range n {
			n[i], _ = strconv.Atoi(m[i+1])
		}
		lines = append(lines, line{n[0], time.UnixMilli(int64(n[1])), time.Duration(n[2]) * time.Millisecond})
	}
	return lines, text
}

// flushed returns up to where the writer knows that everything is flushed.
func (w *writer) flushed() int {
	w.e.Helper()
	return w.latest().flushed
}

func (w *writer) latest() (last line) {
	w.e.Helper()
	if lines, _ := w.lines(10); len(lines) > 0 {
		last = lines[len(lines)-1]
	}
	return last
}

// mark notes where the writer is, for advances and pause.
func (w *writer) mark() {
	w.e.Helper()
	w.last = w.latest()
}

// advances waits until the writer has flushed some that it wrote after the mark.
func (w *writer) advances() {
	w.e.Helper()
	w.e.eventually(longer, "writer in pod "+w.pod+" goes on", func(context.Context) (string, error) {
		lines, text := w.lines(10)
		for _, bad := range []string{"failed:", "wrong:"} {
			if i := strings.Index(text, bad); i >= 0 {
				w.e.Fatalf("writer in pod %s: %s", w.pod, text[i:])
			}
		}
		if len(lines) == 0 || lines[len(lines)-1].flushed < w.last.flushed+64 {
			return fmt.Sprintf("it has flushed %d at the mark, and says now: %s", w.last.flushed, text), nil
		}
		return "", nil
	})
}

// pause returns the longest that one request took since the mark.
func (w *writer) pause() (longest time.Duration) {
	w.e.Helper()
	lines, _ := w.lines(allLines)
	for _, l := range lines {
		if l.at.After(w.last.at) {
			longest = max(longest, l.longest)
		}
	}
	return longest
}

// stop tells the writers of a pod to end, waits until they have read everything and found
// it right, and removes the pod. It returns how far each has flushed.
func (e *env) stop(ws []*writer) (flushed []int) {
	e.Helper()
	e.on(ws[0].node, signal("TERM", e.tag(ws[0].pod)))
	result := e.result(ws[0].pod)
	for _, w := range ws {
		_, text := w.lines(10)
		if !strings.Contains(text, "right:") {
			e.Errorf("writer in pod %s did not say that all is right: %s %s", w.pod, result, text)
		}
		flushed = append(flushed, w.flushed())
	}
	e.deletePods(ws[0].pod)
	return flushed
}

// verify reads what writers have written, in a pod of its own.
func (e *env) verify(p pod, run int, flushed ...int) {
	e.Helper()
	for i, name := range append(p.files, p.blocks...) {
		path := "/dev/" + name
		if i < len(p.files) {
			path = "/" + name + "/written"
		}
		p.writers = append(p.writers, []string{"-verify", "-path=" + path, writerBlocks,
			fmt.Sprint("-run=", run), fmt.Sprint("-flushed=", flushed[i])})
	}
	e.do(p)
}

// signal is a command that sends a signal to all processes that have an argument. Guards,
// which start supervisors, are their containers' first processes, and are left alone.
func signal(name, argument string) string {
	return fmt.Sprintf(`for p in $(grep -lzx -e '%s' /proc/[0-9]*/cmdline 2>/dev/null); do
  grep -qzx -e --guard $p && continue; p=${p#/proc/}; kill -%s ${p%%/cmdline} 2>/dev/null || true; done`,
		argument, name)
}

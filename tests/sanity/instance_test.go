package sanity

// An instance: a directory of its own, the storage that the driver needs, and a berth process that serves it. All
// that a run leaves on the machine is beneath that directory, so it can be found, reported and removed by looking.

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

const (
	startDeadline = 20 * time.Second
	stopDeadline  = 10 * time.Second
	// Deleting a volume may finish in the background.
	leftoverDeadline = 10 * time.Second
)

// interrupted ends on SIGINT or SIGTERM. It lives as long as the process does: a signal must not kill us before the
// pool is unmounted, and after one no further test may start. While specs run, ginkgo sees the signal too and stops.
var interrupted context.Context

func TestMain(m *testing.M) {
	interrupted, _ = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	os.Exit(m.Run())
}

type instance struct {
	dir    string // no symlinks in it, as in the kernel's mount table
	name   string // the driver's key in drivers
	driver driver
	exited chan struct{} // closed when the process has ended, for whatever reason
	child  *exec.Cmd
}

func (i *instance) path(name string) string  { return filepath.Join(i.dir, name) }
func (i *instance) controllerSocket() string { return i.path("run/controller.sock") }
func (i *instance) nodeSocket() string       { return i.path("run/node.sock") }

func driverName() string {
	if name := os.Getenv("BERTH_DRIVER"); name != "" {
		return name
	}
	return "nvme"
}

func driverUnderTest(t *testing.T) driver {
	t.Helper()
	driver, known := drivers[driverName()]
	if !known {
		t.Fatalf("BERTH_DRIVER is %q, which the table in drivers_test.go does not have", driverName())
	}
	return driver
}

// start makes an instance of the driver under test that serves both sockets. It is gone when the test ends, however
// that ends; only SIGKILL or go test's own time-out, which runs nothing afterwards, leave the directory and its mount.
func start(t *testing.T) *instance {
	t.Helper()
	if interrupted.Err() != nil {
		t.Fatal("interrupted")
	}
	driver := driverUnderTest(t)
	berth := os.Getenv("BERTH_BIN")
	if !filepath.IsAbs(berth) {
		t.Fatalf("BERTH_BIN is %q; set it to the absolute path of the berth binary", berth)
	}
	if os.Geteuid() != 0 {
		t.Fatal("these tests mount file systems: run them as root")
	}

	dir, err := os.MkdirTemp("", "berth-sanity-")
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{dir: dir, name: driverName(), driver: driver}
	t.Cleanup(func() { i.removeAll(t) })
	if err := os.Mkdir(i.path("registry"), 0o750); err != nil {
		t.Fatal(err)
	}
	storage := driver.setup(t, i)
	config := i.path("berth.yaml")
	if err := os.WriteFile(config, []byte(i.config(storage)), 0o600); err != nil {
		t.Fatal(err)
	}
	i.serve(t, berth, config)
	return i
}

func (i *instance) config(storage string) string {
	return fmt.Sprintf(`node:
  name: sanity-node
log: {format: text, level: info}
http: {address: "127.0.0.1:0"}
%sdrivers:
  - {backend: %[2]s, name: %[2]s.csi.berth.dev, role: controller, socket: %[3]s}
  - {backend: %[2]s, name: %[2]s.csi.berth.dev, role: node, socket: %[4]s, kubelet: {registry: %[5]s}}
`, storage, i.name, i.controllerSocket(), i.nodeSocket(), i.path("registry"))
}

// serve starts berth and returns when both sockets accept connections.
func (i *instance) serve(t *testing.T, berth, config string) {
	t.Helper()
	log, err := os.Create(i.path("berth.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the child has its own descriptor
	i.child = exec.Command(berth, "serve", "--config", config)
	i.child.Stdout, i.child.Stderr = log, log
	i.child.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,            // Ctrl-C is for us: the child has to outlive the specs that it interrupts
		Pdeathsig: syscall.SIGKILL, // and it must not outlive this process
	}
	if err := i.child.Start(); err != nil {
		t.Fatalf("cannot start BERTH_BIN: %v", err)
	}
	i.exited = make(chan struct{})
	go func() {
		i.child.Wait() // the outcome is kept in child.ProcessState
		close(i.exited)
	}()
	t.Cleanup(func() { i.stop(t) })

	deadline := time.After(startDeadline)
	for _, socket := range []string{i.controllerSocket(), i.nodeSocket()} {
		for {
			conn, err := net.Dial("unix", socket)
			if err == nil {
				conn.Close()
				break
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-i.exited:
				t.Fatal("berth has ended before it served")
			case <-interrupted.Done():
				t.Fatal("interrupted")
			case <-deadline:
				t.Fatalf("berth does not serve after %s: %v", startDeadline, err)
			}
		}
	}
}

// stop ends the process; that it ends by itself, or badly, or not at all, is a failure. After any failure it prints
// what the process logged.
func (i *instance) stop(t *testing.T) {
	select {
	case <-i.exited:
		t.Errorf("berth had ended by itself: %s", i.child.ProcessState)
	default:
		i.child.Process.Signal(syscall.SIGTERM)
		select {
		case <-i.exited:
			if !i.child.ProcessState.Success() {
				t.Errorf("on SIGTERM, berth ended badly: %s", i.child.ProcessState)
			}
		case <-time.After(stopDeadline):
			t.Errorf("berth was still there %s after SIGTERM", stopDeadline)
			i.child.Process.Kill()
			<-i.exited
		}
	}
	if t.Failed() {
		log, err := os.ReadFile(i.path("berth.log"))
		if err != nil {
			t.Error(err)
		}
		t.Logf("what berth in %s logged:\n%s", i.dir, bytes.TrimSpace(log))
	}
}

// expectNothingLeft is for a driver that still runs and of which all volumes and snapshots have been deleted.
func (i *instance) expectNothingLeft(t *testing.T) {
	for deadline := time.Now().Add(leftoverDeadline); ; time.Sleep(100 * time.Millisecond) {
		left := i.driver.leftovers(t, i)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) || interrupted.Err() != nil {
			for _, thing := range left {
				t.Errorf("left behind: %s", thing)
			}
			return
		}
	}
}

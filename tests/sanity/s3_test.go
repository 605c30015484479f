package sanity

// Object storage: a MinIO of this run (BERTH_MINIO is its program), or the RGW of a cluster of scripts/lab.sh, whose
// DIR/env is in our environment. BERTH_S3_CLASS says what a volume is: a bucket, or a prefix of one.

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The bucket of the class `prefix`.
const sharedBucket = "sanity-data"

type service struct{ endpoint, access, secret string }

func s3Service(t *testing.T, i *instance) service {
	t.Helper()
	if minio := os.Getenv("BERTH_MINIO"); minio != "" {
		return startMinio(t, i, minio)
	}
	return service{lab(t, "S3_ENDPOINT"), lab(t, "S3_ACCESS_KEY"), lab(t, "S3_SECRET_KEY")}
}

// freePorts are two that nobody listens on; MinIO would take a fixed one for its console.
func freePorts(t *testing.T) (ports [2]string) {
	t.Helper()
	for n := range ports {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close() // at the end, so that they differ
		ports[n] = listener.Addr().String()
	}
	return ports
}

func startMinio(t *testing.T, i *instance, program string) service {
	t.Helper()
	ports := freePorts(t)
	s := service{"http://" + ports[0], "sanity-access", "sanity-secret"}
	minio := exec.Command(program, "server", i.path("minio"), "--quiet", "--address", ports[0], "--console-address", ports[1])
	minio.Env = append(os.Environ(), "MINIO_ROOT_USER="+s.access, "MINIO_ROOT_PASSWORD="+s.secret)
	minio.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := minio.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		minio.Process.Kill()
		minio.Wait()
	})
	for deadline := time.Now().Add(startDeadline); ; time.Sleep(100 * time.Millisecond) {
		status, _, err := s.call("GET", "/", nil)
		if err == nil && status == http.StatusOK {
			return s
		}
		if time.Now().After(deadline) || interrupted.Err() != nil {
			t.Fatalf("%s does not answer: %d, %v", program, status, err)
		}
	}
}

// call makes one signed request (AWS Signature Version 4, with an empty body). No library of ours is trusted with what
// it is to check.
func (s service) call(method, path string, query url.Values) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	encoded := strings.ReplaceAll(query.Encode(), "+", "%20")
	request, err := http.NewRequestWithContext(ctx, method, s.endpoint+path+"?"+encoded, nil)
	if err != nil {
		return 0, nil, err
	}
	now := time.Now().UTC()
	stamp, day := now.Format("20060102T150405Z"), now.Format("20060102")
	empty := sha256.Sum256(nil)
	payload := hex.EncodeToString(empty[:])
	request.Header.Set("X-Amz-Date", stamp)
	request.Header.Set("X-Amz-Content-Sha256", payload)
	signed := "host;x-amz-content-sha256;x-amz-date"
	canonical := strings.Join([]string{method, path, encoded,
		"host:" + request.URL.Host, "x-amz-content-sha256:" + payload, "x-amz-date:" + stamp, "", signed, payload}, "\n")
	scope := day + "/us-east-1/s3/aws4_request"
	hash := sha256.Sum256([]byte(canonical))
	key := []byte("AWS4" + s.secret)
	for _, part := range []string{day, "us-east-1", "s3", "aws4_request",
		"AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hex.EncodeToString(hash[:])} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	request.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		s.access, scope, signed, hex.EncodeToString(key)))
	reply, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer reply.Body.Close()
	body, err := io.ReadAll(reply.Body)
	return reply.StatusCode, body, err
}

// names lists the buckets, or what is in one of them.
func (s service) names(t *testing.T, path string, query url.Values) []string {
	t.Helper()
	status, body, err := s.call("GET", path, query)
	if err != nil || status != http.StatusOK {
		t.Fatalf("GET %s: %d, %v: %s", path, status, err, body)
	}
	var listed struct {
		Buckets  struct{ Bucket []struct{ Name string } }
		Contents []struct{ Key string }
	}
	if err := xml.Unmarshal(body, &listed); err != nil {
		t.Fatalf("GET %s: %v: %s", path, err, body)
	}
	var names []string
	for _, bucket := range listed.Buckets.Bucket {
		names = append(names, bucket.Name)
	}
	for _, object := range listed.Contents {
		names = append(names, object.Key)
	}
	return names
}

var services = map[string]service{} // by the directory of the instance

// describeService returns the service that the driver is to use, and writes the secrets that calls carry.
func describeService(t *testing.T, i *instance) string {
	t.Helper()
	s := s3Service(t, i)
	services[i.dir] = s
	if status, body, err := s.call("PUT", "/"+sharedBucket, nil); err != nil || status != http.StatusOK {
		t.Fatalf("cannot make %s: %d, %v: %s", sharedBucket, status, err, body)
	}
	t.Cleanup(func() { s.call("DELETE", "/"+sharedBucket, nil) })
	var secrets strings.Builder
	for _, call := range []string{"CreateVolume", "DeleteVolume", "ControllerValidateVolumeCapabilities",
		"ControllerExpandVolume", "ControllerModifyVolume", "NodeStageVolume", "NodePublishVolume"} {
		fmt.Fprintf(&secrets, "%sSecret: {accessKeyId: %q, secretAccessKey: %q}\n", call, s.access, s.secret)
	}
	for file, text := range map[string]string{secretsFile: secrets.String(), "access": s.access, "secret": s.secret} {
		if err := os.WriteFile(i.path(file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kind := "ceph-rgw"
	if os.Getenv("BERTH_MINIO") != "" {
		kind = "minio"
	}
	// Workers are no root: they have to get through this directory to the staging folder.
	if err := os.Chmod(i.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`services:
  - {name: main, kind: %s, url: "%s", buckets: [%s], accessKeyFile: %[4]s/access, secretKeyFile: %[4]s/secret}
mounter: {socket: %[4]s/run/mounter.sock, start: true, staging: %[4]s/s3/staging, cache: %[4]s/s3/cache}
`, kind, s.endpoint, sharedBucket, i.dir)
}

// s3Parameters are those of the class.
func s3Parameters() map[string]string {
	if os.Getenv("BERTH_S3_CLASS") == "prefix" {
		return map[string]string{"bucket": sharedBucket}
	}
	return nil
}

// serviceLeftovers lists mounts, buckets of volumes, and what is in the shared one.
func serviceLeftovers(t *testing.T, i *instance) []string {
	var left []string
	for _, mount := range mountsBeneath(t, i.dir) {
		left = append(left, "mount "+mount)
	}
	s := services[i.dir]
	buckets := s.names(t, "/", nil)
	if !slices.Contains(buckets, sharedBucket) {
		left = append(left, "no bucket "+sharedBucket+": we look in the wrong place")
	}
	for _, bucket := range buckets {
		if strings.HasPrefix(bucket, "berth-") {
			left = append(left, "bucket "+bucket)
		}
	}
	for _, key := range s.names(t, "/"+sharedBucket, url.Values{"list-type": {"2"}}) {
		left = append(left, "object "+key)
	}
	return left
}
